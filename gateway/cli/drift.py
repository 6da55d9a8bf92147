"""`driftgate drift`: what the monitors of a running server see."""

from datetime import UTC, datetime
from typing import Annotated, Any
from urllib.parse import quote

import typer
from rich.markup import escape

from gateway.cli import output
from gateway.cli.door import Running, takes
from gateway.errors import BadRequestError, GatewayError, StartError

_PSI_FULL = 0.5
_WIDE = 100


@takes(Running)
def drift(
    words: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[MODEL | adopt MODEL | accept MODEL | ack ALARM]",
            help="A model; nothing: all models, a line each; adopt MODEL: let its next served"
            " rows become the reference; accept MODEL: let a window's; ack ALARM: it was seen.",
        ),
    ] = None,
    version: Annotated[int | None, typer.Option(help="Default: the version that answers.")] = None,
    window: Annotated[str, typer.Option(help="last, 1h, 24h, decayed, total.")] = "last",
    against: Annotated[
        str | None,
        typer.Option(help="champion: compare a version with it, rows of the same time."),
    ] = None,
    rows: Annotated[int, typer.Option(help="With adopt: how many rows.")] = 1000,
    *,
    running: Running,
) -> None:
    """Show drift by channel, with small bars, or adopt a reference."""
    call, as_json = running.call, running.as_json
    # Typed names and numbers go to the server as they are: it says what is wrong with them.
    chosen = {} if version is None else {"version": version}
    match words or []:
        case []:
            found = call("GET", "/drift")["models"]
            output.print_json(found) if as_json else _print_summary(found)
        case [model] if against is not None:
            query = {"window": window, "against": against}
            query |= {name: str(number) for name, number in chosen.items()}
            found = call("GET", f"/drift/{quote(model, safe='')}", query=query)
            output.print_json(found) if as_json else print_comparison(found)
        case [model]:
            query = {"window": window} | {name: str(number) for name, number in chosen.items()}
            report = call("GET", f"/drift/{quote(model, safe='')}", query=query)
            right = _performance(running, model, chosen)
            if as_json:
                output.print_json({**report, "performance": right})
            else:
                print_report(report)
                print_performance(right)
        case ["adopt", model]:
            path = f"/admin/models/{quote(model, safe='')}/reference"
            call("POST", path, body={"rows": rows, **chosen})
            typer.echo(f"{model}: the next {rows} served rows become its reference")
        case ["accept", model]:
            path = f"/admin/models/{quote(model, safe='')}/accept"
            found = call("POST", path, body={"window": window, **chosen})
            if as_json:
                output.print_json(found)
            else:
                rows = found["reference"]["rows"]
                typer.echo(f"{model}: the {rows} rows of window {window} are its reference now")
        case ["ack", alarm]:
            call("POST", f"/admin/alarms/{quote(alarm, safe='')}/ack", body={})
            typer.echo(f"{alarm}: acknowledged; quiet for its hold-off")
        case _:
            raise BadRequestError("drift takes a model, or: adopt MODEL, accept MODEL, ack ALARM")


def print_report(report: dict[str, Any]) -> None:
    """One version's report as a table."""
    console = output.console
    console.print(f"[bold]{escape(report['model'])}[/] version {report['version']}")
    found = report["report"]
    if found is None:
        console.print(report["message"], markup=False)
    else:
        state = ", not yet full" if found["is_partial"] else ""
        console.print(
            f"window {found['window']}: {found['n_rows']} rows{state};"
            f" reference: {report['reference']['rows']} rows"
        )
        console.print(_channel_table(found))
        console.print(
            "line: what 99 % of windows of this size stay below without drift", style="dim"
        )
    for alarm in found["alarms"] if found else []:
        _print_alarm(alarm)
    _print_requests(report.get("requests"))
    for problem in (*report["problems"], *report["coverage"]["gaps"]):
        console.print(f"note: {problem}", markup=False)


def _print_requests(found: dict[str, Any] | None) -> None:
    """How many requests were refused, where there were any."""
    if found is None or not found["codes"]["any"]["n_refused"]:
        return
    about = found["codes"]["any"]
    normal = "" if about["bound"] is None else f"; up to {about['bound']:.1%} is normal"
    codes = ", ".join(
        f"{code} {one['n_refused']}"
        for code, one in found["codes"].items()
        if one["n_refused"] and code != "any"
    )
    output.console.print(f"refused of late: {about['share']:.1%} of requests{normal} ({codes})")
    for alarm in found["alarms"]:
        colour = "bold red" if alarm["level"] == "page" else "yellow"
        output.console.print(
            f"[{colour}]{alarm['level']}[/]: {alarm['channel']}"
            f" (evidence {_odds(alarm['evidence'])})"
        )


def print_comparison(found: dict[str, Any]) -> None:
    """Two versions side by side as a table."""
    console, report = output.console, found["report"]
    console.print(
        f"[bold]{escape(found['model'])}[/] version {found['version']}, {report['n_rows']} rows,"
        f" beside version {found['against']}, {report['n_against']} rows"
    )
    shown = output.table(
        "channel", "PSI", "line", "", "evidence", "champion", "version",
        right=["PSI", "line", "evidence"],
    )  # fmt: skip
    named = {one["channel"] for one in report["differences"]}
    for channel in report["channels"]:
        psi, name = channel["scores"].get("psi"), channel["name"]
        if psi is None:
            shown.add_row(escape(name), "-", "-", "no rows", "-")
            continue
        colour = "red" if name in named else "yellow" if psi["is_above"] else "default"
        shown.add_row(
            escape(name),
            f"[{colour}]{psi['value']:.3f}[/]",
            f"{psi['line']:.3f}",
            "differs" if name in named else "above" if psi["is_above"] else "",
            _odds(channel["evidence"]),
            output.bars(channel["against"]),
            output.bars(channel["current"]),
        )
    console.print(shown)
    for one in report["differences"]:
        moved = ", ".join(
            f"{escape(part['bin'])} {part['against']:.1%} / {part['current']:.1%}"
            for part in one["moved"]
        )
        console.print(
            f"[red]differs[/]: {escape(one['channel'])}"
            f" (evidence {_odds(one['evidence'])}): {moved}"
        )
    for problem in found["problems"]:
        console.print(f"note: {problem}", markup=False)


def _print_alarm(alarm: dict[str, Any]) -> None:
    """What is raised, how sure, since when, and which bins moved."""
    colour = "bold red" if alarm["level"] == "page" else "yellow"
    where = "" if alarm["segment"] is None else f" in segment {escape(alarm['segment'])}"
    since = "" if alarm["since"] is None else f", since {_moment(alarm['since'])}"
    seen = ", acknowledged" if alarm["acknowledged_row"] is not None else ""
    output.console.print(
        f"[{colour}]{alarm['level']}[/] {escape(alarm['id'])}: {escape(alarm['channel'])}{where}"
        f" (evidence {_odds(alarm['evidence'])}{since}{seen})"
    )
    moved = ", ".join(
        f"{escape(part['bin'])} {part['reference']:.1%} -> {part['current']:.1%}"
        for part in alarm["moved"]
    )
    if moved:
        output.console.print(f"  moved: {moved}", style="dim")


def _moment(seconds: float) -> str:
    return f"{datetime.fromtimestamp(seconds, tz=UTC):%Y-%m-%d %H:%M:%S} UTC"


def _odds(evidence: float) -> str:
    return f"{evidence:,.0f} : 1" if evidence < 1e9 else f"{evidence:.0e} : 1"


def _performance(running: Running, model: str, chosen: dict[str, int]) -> dict[str, Any] | None:
    """How right the version was; None where no labels are kept."""
    query = {name: str(number) for name, number in chosen.items()}
    try:
        found: dict[str, Any] = running.call(
            "GET", f"/drift/{quote(model, safe='')}/performance", query=query
        )
    except StartError:
        raise
    except GatewayError:
        return None
    return found


def print_performance(found: dict[str, Any] | None) -> None:
    """What labels say, beside what scores alone would say."""
    if found is None or not found["n_predictions"]:
        return
    console = output.console
    console.print(
        f"performance, last 30 days: {found['n_labelled']} of {found['n_predictions']}"
        f" predictions have labels ({found['task']}, output {escape(found['output'])})"
    )
    realised, estimated = found["realised"] or {}, found["estimated"] or {}
    shown = output.table("", "by labels", "95 %", "estimated", right=["by labels", "estimated"])
    for name in dict.fromkeys((*realised, *estimated)):
        by_labels, by_scores = realised.get(name) or {}, estimated.get(name) or {}
        bounds = [_number(by_labels.get(bound)) for bound in ("low", "high")]
        shown.add_row(
            name.replace("_", " "),
            _number(by_labels.get("value")),
            " to ".join(bounds) if by_labels else "",
            _number(by_scores.get("value")) if by_scores else "",
        )
    console.print(shown)
    if found["estimated_means"]:
        console.print(f"estimated: {found['estimated_means']}", style="dim", markup=False)
    _print_judged(found)


def _print_judged(found: dict[str, Any]) -> None:
    """What is said about labels beside the figures: alarms, and what they are worth."""
    console, judged = output.console, found["judged"] or {}
    scores = found["coverage"]["scores"]
    if scores and scores["differ"]:
        console.print(
            f"note: predictions with labels score {scores['labelled']:.3f} on average, the others"
            f" {scores['unlabelled']:.3f}: labels do not stay away by chance",
            markup=False,
        )
    if judged.get("message"):
        console.print(f"note: {judged['message']}", markup=False)
    for alarm in judged.get("alarms", ()):
        colour = "bold red" if alarm["level"] == "page" else "yellow"
        since = "" if alarm["since"] is None else f", since {_moment(alarm['since'])}"
        console.print(
            f"[{colour}]{alarm['level']}[/] {escape(alarm['reason'])}"
            f" (evidence {_odds(alarm['evidence'])}{since})"
        )


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def _channel_table(found: dict[str, Any]) -> Any:
    """A row a channel; on a wide terminal also its histograms, reference above what is served."""
    is_wide = output.console.width >= _WIDE
    shown = output.table(
        "channel", "PSI", "line", "", "JS", "missing", *(["reference", "now"] if is_wide else []),
        right=["PSI", "line", "JS", "missing"],
    )  # fmt: skip
    alarmed = {alarm["feature"] for alarm in found["alarms"]}
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


def _brief(alarms: list[str]) -> str:
    more = f" and {len(alarms) - 2} more" if len(alarms) > 2 else ""
    return (", ".join(alarms[:2]) + more) or "none"


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
            escape(_brief(model["alarms"])),
        )  # fmt: skip
    output.console.print(shown)
