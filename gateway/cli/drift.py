"""`driftgate drift`: what the monitors of a running server see."""

from typing import Annotated, Any
from urllib.parse import quote

import typer
from rich.markup import escape

from gateway.cli import output
from gateway.errors import BadRequestError

_PSI_FULL = 0.5
_WIDE = 100


def drift(
    words: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[MODEL | adopt MODEL]",
            help="A model; nothing: all models, a line each; adopt MODEL: let its next served"
            " rows become the reference.",
        ),
    ] = None,
    server: Annotated[
        str | None, typer.Option(help="Default: $DRIFTGATE_SERVER, else port 8000.")
    ] = None,
    version: Annotated[int | None, typer.Option(help="Default: the version that answers.")] = None,
    window: Annotated[str, typer.Option(help="last, current or total.")] = "last",
    rows: Annotated[int, typer.Option(help="With adopt: how many rows.")] = 1000,
    as_json: Annotated[bool, typer.Option("--json", help="As JSON.")] = False,
) -> None:
    """Show drift by channel, with small bars, or adopt a reference."""
    from gateway.outgoing import call

    url = server or output.server_default()
    # Typed names and numbers go to the server as they are: it says what is wrong with them.
    chosen = {} if version is None else {"version": version}
    match words or []:
        case []:
            found = call(url, "GET", "/drift")["models"]
            output.print_json(found) if as_json else _print_summary(found)
        case [model]:
            query = {"window": window} | {name: str(number) for name, number in chosen.items()}
            report = call(url, "GET", f"/drift/{quote(model, safe='')}", query=query)
            output.print_json(report) if as_json else print_report(report)
        case ["adopt", model]:
            path = f"/admin/models/{quote(model, safe='')}/reference"
            call(url, "POST", path, body={"rows": rows, **chosen})
            typer.echo(f"{model}: the next {rows} served rows become its reference")
        case _:
            raise BadRequestError("drift takes a model, or: adopt MODEL")


def print_report(report: dict[str, Any]) -> None:
    """One version's report as a table."""
    console = output.console
    console.print(f"[bold]{escape(report['model'])}[/] version {report['version']}")
    found = report["report"]
    if found is None:
        console.print(report["message"], markup=False)
    else:
        state = "open, not yet full" if found["is_partial"] else f"number {found['index']}"
        console.print(
            f"window {found['window']}: {found['n_rows']} rows ({state});"
            f" reference: {report['reference']['rows']} rows"
        )
        console.print(_channel_table(found))
        console.print(
            "line: what 99 % of windows of this size stay below without drift", style="dim"
        )
    for alarm in found["alarms"] if found else []:
        console.print(
            f"[bold red]alarm[/] {escape(alarm['channel'])}: {alarm['statistic']}"
            f" {alarm['value']:.2f} (without drift below {alarm['line']:.3f}),"
            f" since window {alarm['since']}"
        )
    for problem in report["problems"]:
        console.print(f"note: {problem}", markup=False)


def _channel_table(found: dict[str, Any]) -> Any:
    """A row a channel; on a wide terminal also its histograms, reference above what is served."""
    is_wide = output.console.width >= _WIDE
    shown = output.table(
        "channel", "PSI", "line", "", "JS", "missing", *(["reference", "now"] if is_wide else []),
        right=["PSI", "line", "JS", "missing"],
    )  # fmt: skip
    alarmed = {alarm["channel"] for alarm in found["alarms"]}
    for channel in found["channels"]:
        scores = channel["scores"]
        psi, name = scores["psi"], channel["name"]
        if not channel["n_rows"] or psi["value"] is None:
            shown.add_row(escape(name), "-", "-", "no rows")
            continue
        colour = "red" if name in alarmed else "yellow" if psi["is_above"] else "default"
        bars = [output.bars(channel["reference"]), output.bars(channel["current"])]
        shown.add_row(
            escape(name),
            f"[{colour}]{psi['value']:.3f}[/]",
            f"{psi['line']:.3f}",
            f"[{colour}]{output.gauge(psi['value'], _PSI_FULL)}[/]"
            + (" alarm" if name in alarmed else " above" if psi["is_above"] else ""),
            f"{scores['jensen_shannon']['value']:.3f}",
            f"{scores['missing_rate']['value']:.1%}",
            *(bars if is_wide else []),
        )
    return shown


def _print_summary(models: list[dict[str, Any]]) -> None:
    shown = output.table(
        "model", "version", "rows", "highest PSI", "channel", "alarms",
        right=["version", "rows", "highest PSI"],
    )  # fmt: skip
    for model in models:
        highest = model["highest"]
        shown.add_row(
            escape(model["model"]),
            str(model["version"]),
            str(model["rows_observed"]),
            f"{highest['psi']:.3f}" if highest else "-",
            escape(highest["feature"]) if highest else
            ("no window yet" if model["reference"] else "no reference"),
            escape(", ".join(model["alarms"])) or "none",
        )  # fmt: skip
    output.console.print(shown)
