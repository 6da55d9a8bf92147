"""`driftgate shadow`: a version gets copies of requests, and is compared with who answers."""

from typing import Annotated, Any
from urllib.parse import quote

import typer

from gateway.cli import output
from gateway.cli.canary import BREACH
from gateway.cli.door import How, Where, change, takes
from gateway.errors import ConfigError, NotFoundError

app = typer.Typer(
    no_args_is_help=True,
    help="Compare a version on copies of requests, answering nobody.",
    rich_markup_mode=None,
)
Model = Annotated[str, typer.Argument(help="Its name.")]
To = Annotated[str, typer.Argument(help="The number of a version, or an alias.")]


@app.command("start")
@takes(Where, How)
def start(
    model: Model,
    to: To,
    sample: Annotated[float, typer.Option(help="Percent of units that are copied.")] = 100,
    inflight_max: Annotated[int, typer.Option(help="Copies that may wait or run.")] = 4,
    bytes_max: Annotated[int, typer.Option(help="Bytes that these may hold.")] = 67_108_864,
    deadline_s: Annotated[float, typer.Option(help="A copy that is older is dropped.")] = 0.5,
    disagreement_max: Annotated[float, typer.Option(help="Percent that may disagree.")] = 2,
    compare: Annotated[
        list[str] | None,
        typer.Option(help="OUTPUT:atol=X,rtol=Y or OUTPUT:threshold=X; may be repeated."),
    ] = None,
    *,
    where: Where,
    how: How,
) -> None:
    """Give a version copies of a model's requests; it answers nobody."""
    from registry import changes, names, routes

    document: dict[str, Any] = {
        "sample": _plain(sample),
        "inflight_max": inflight_max,
        "bytes_max": bytes_max,
        "deadline_s": deadline_s,
        "disagreement_max": _plain(disagreement_max),
        "compare": dict(map(_tolerance, compare or [])),
    }
    given = {**document, "to": names.version(to) or to}
    shadow, problems = routes.read_part(routes.Shadow, given, "shadow")
    if shadow is None or problems:
        raise ConfigError(*problems)
    made = changes.PutShadow(model, shadow)
    change(where, how, lambda _: made, ("PUT", _path(model, to), document))


@app.command("report")
@takes(Where)
def report(
    model: Model,
    to: Annotated[str | None, typer.Argument(help="Only this shadow; nothing: all.")] = None,
    *,
    where: Where,
) -> None:
    """Say how shadows compare with the champion; exit 5 if one is worse than it may be."""
    found = _report(where, model)
    if to is not None:
        found = [each for each in found if to in (each["to"], str(each["version"]))]
    if not found:
        raise NotFoundError(f"model {model[:80]!r} has no shadow {to or ''}".rstrip())
    if where.as_json:
        output.print_json({"model": model, "shadows": found})
    else:
        for each in found:
            _print(model, each)
    if any(each["running"] and each["verdict"] == "breach" for each in found):
        raise typer.Exit(BREACH)


@app.command("stop")
@takes(Where, How)
def stop(model: Model, to: To, *, where: Where, how: How) -> None:
    """Give a version no more copies; what was compared stays."""
    from registry import changes

    made = changes.DeleteShadow(model, to)
    change(where, how, lambda _: made, ("DELETE", _path(model, to), None))


def _report(where: Where, model: str) -> list[dict[str, Any]]:
    if where.server:
        path = f"/drift/{quote(model, safe='')}/shadows"
        answer: list[dict[str, Any]] = where.call("GET", path)["shadows"]
        return answer
    from gateway.shadow.report import report as read
    from registry.revisions import ModelState

    head = where.read(lambda revisions: revisions.head())
    return read(where.state_path, model, head.models.get(model, ModelState()))


def _print(model: str, found: dict[str, Any]) -> None:
    say, cover, told = typer.echo, found["coverage"], found["disagreement"]
    stopped = "" if found["running"] else " (stopped)"
    say(
        f"{model}: shadow {found['to']}, version {found['version']} against"
        f" {found['against']}{stopped}: {found['verdict']}"
    )
    say(f"  {found['reason']}")
    if found["problem"]:
        say(f"  not copied: {found['problem']}")
    if told["share"] is not None:
        say(
            f"  disagree   {told['differ']} of {told['n']} units, {100 * told['share']:.2f} %;"
            f" {100 * told['allowed']:g} % are allowed"
        )
    if found["requests"]["failed"]:
        say(f"  failed     on {found['requests']['failed']} of {found['requests']['compared']}")
    for name, output_ in found["outputs"].items():
        why = f" ({output_['problem']})" if output_["problem"] else ""
        say(f"  {name}: {output_['rows_differ']} of {found['rows']['compared']} rows differ{why}")
    for name, each in found["differences"].items():
        if each["mean"] is not None:
            between = (
                "" if each["low"] is None else f", from {each['low']:.3g} to {each['high']:.3g}"
            )
            say(f"  {name}: {each['mean']:+.3g} on average{between}")
    for bin_ in found["worst_bins"][:5]:
        say(
            f"  worst      {bin_['channel']} {bin_['bin']}: {bin_['differ']} of {bin_['rows']}"
            f" rows, {100 * bin_['share']:.1f} %"
        )
    if cover["sampled"]:
        biased = "  load-biased" if cover["load_biased"] else ""
        why = ", ".join(f"{n} {reason}" for reason, n in sorted(cover["dropped"].items()))
        say(
            f"  coverage   {100 * cover['share']:.1f} % of {cover['sampled']}"
            f"{f'; dropped: {why}' if why else ''}{biased}"
        )
    if (labels := found["labels"]) is not None and labels["units"]:
        say(
            f"  labels     of {labels['units']} units: {labels['shadow_alone']} wrong alone,"
            f" the champion {labels['champion_alone']}"
        )


def _tolerance(text: str) -> tuple[str, dict[str, float]]:
    """`score:atol=0.01,rtol=0` as a part of `compare`."""
    name, _, rest = text.rpartition(":")
    found: dict[str, float] = {}
    for part in rest.split(","):
        key, _, value = part.partition("=")
        try:
            found[key.strip()] = float(value)
        except ValueError:
            name = ""
    if not name:
        raise ConfigError(f"--compare {text[:80]!r}: write OUTPUT:atol=X,rtol=Y or :threshold=X")
    return name, found


def _plain(number: float) -> float:
    """A whole number as such: so that it is written as people write it."""
    return int(number) if number == int(number) else number


def _path(model: str, to: str) -> str:
    return f"/admin/models/{quote(model, safe='')}/shadows/{quote(to, safe='')}"
