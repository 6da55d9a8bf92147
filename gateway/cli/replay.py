"""`driftgate replay`: a capture run again, through two versions, with no server."""

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from gateway.cli import output, places
from gateway.errors import BadRequestError

if TYPE_CHECKING:
    from gateway.replay import Side
    from registry.catalog import VersionFiles
    from registry.revisions import Revision
    from registry.routes import Shadow, Tolerance

BREACH = 5
"""Exit code: a guard would have found what must not be."""


def replay(  # noqa: PLR0917  typer reads options from the parameters
    capture: Annotated[
        str, typer.Argument(help="last-24h (s, m, h, d), all, or a file or directory of captures.")
    ],
    target: Annotated[
        str, typer.Option(metavar="MODEL@VERSION", help="The version that is looked at.")
    ],
    against: Annotated[
        str, typer.Option(metavar="VERSION|ALIAS", help="The version that it is held against.")
    ] = "champion",
    atol: Annotated[
        float | None, typer.Option(min=0, help="Numbers may differ by so much,")
    ] = None,
    rtol: Annotated[
        float | None, typer.Option(min=0, help="and by so much of the first one's size, together.")
    ] = None,
    threshold: Annotated[
        list[str] | None,
        typer.Option(metavar="OUTPUT=NUMBER", help="Only the side of this number counts."),
    ] = None,
    disagreement_max: Annotated[
        float | None,
        typer.Option(min=0.01, max=99.9, help="Percent of units that may disagree: 2."),
    ] = None,
    plan_file: Annotated[
        Path | None, typer.Option("--plan", help="Of a rollout, whose guards are asked.")
    ] = None,
    registry: places.Registry = places.REGISTRY,
    state_dir: places.State = None,
    run_dir: Annotated[str | None, typer.Option(help="As of the server.")] = None,
    as_json: places.AsJSON = False,
) -> None:
    """Compare two versions on captured requests; exit 5 if a guard would have fired."""
    from gateway.cli.canary import plan_of
    from gateway.cli.capture import reading_of, settings_of
    from gateway.cli.versions import head_of, resolve
    from gateway.decision import guards_of
    from gateway.replay import replay as through
    from registry.rollouts import Rollout

    model, at, _ = target.partition("@")
    if not at:
        raise BadRequestError(f"--target {target!r}: write MODEL@VERSION, or MODEL@ALIAS")
    plan = plan_of(plan_file)
    found, head = places.look(registry), head_of(places.state_of(registry, state_dir))
    sides = [resolve(found, head, target), resolve(found, head, f"{model}@{against}")]
    reading = reading_of(capture, model, settings_of(registry, state_dir, run_dir))
    with tempfile.TemporaryDirectory(prefix="driftgate-replay-") as scratch:
        newer, older = (_opened(files, Path(scratch)) for files in sides)
        shadow = _shadow(head, newer)
        tolerances = _tolerances(older, shadow, atol, rtol, threshold or [])
        with output.progress("replaying") as bar:
            task = bar.add_task("", total=max(reading.n_bytes, 1))
            report = through(
                reading,
                newer,
                older,
                guards_of(Rollout(id="", candidate=0, control=0, phase="step", plan=plan)),
                alpha=plan.alpha,
                disagreement_max=disagreement_max or (shadow.disagreement_max if shadow else 2),
                units_min=plan.steps[0].units_min,
                tolerances=tolerances,
                progress=lambda: bar.update(task, completed=reading.done_bytes),
            )
    if not report.requests:
        why = "; ".join(f"{n} requests: {reason}" for reason, n in report.left_out.items())
        raise BadRequestError(
            f"{capture}: holds no request of model {model!r} that can be replayed"
            + (f" ({why})" if why else "")
        )
    report.passed_over = reading.said()
    document = report.document()
    output.print_json(document) if as_json else _print(document)
    if report.is_breach:
        raise typer.Exit(BREACH)


def _opened(files: "VersionFiles", scratch: Path) -> "Side":
    from gateway.columns import columns_of, fit
    from gateway.config import ServerConfig
    from gateway.loader import Loader
    from gateway.replay import Side
    from gateway.shadow import places_of
    from gateway.shadow.tally import Pairing
    from registry.routes import Shadow

    loaded = Loader(ServerConfig(), scratch).load(files)
    signature, profile = loaded.session.signature, loaded.profile
    places = None
    if profile is not None:
        pairing = Pairing(files.model, "", 0, files.version, Shadow(to=files.version))
        columns, _ = fit(profile, columns_of(signature)[0], signature)
        places = places_of(lambda *_: (columns, profile), pairing)
    return Side(files.model, files.version, loaded.digest, loaded.session, places)


def _shadow(head: "Revision", side: "Side") -> "Shadow | None":
    """How the route compares this version, if it is a shadow there."""
    state = head.models.get(side.model)
    if state is None or state.route is None:
        return None
    for shadow in state.route.shadow:
        to = shadow.to if isinstance(shadow.to, int) else state.aliases.get(shadow.to)
        if to == side.version:
            return shadow
    return None


def _tolerances(
    side: "Side",
    shadow: "Shadow | None",
    atol: float | None,
    rtol: float | None,
    thresholds: list[str],
) -> "dict[str, Tolerance]":
    """By output; those of whole numbers and texts are held to equality unless they are named."""
    from gateway.comparison import DEFAULT
    from registry.routes import Tolerance

    kinds = {spec.name: spec.datatype for spec in side.session.signature.outputs}
    made = {
        name: Tolerance(
            atol=DEFAULT.atol if atol is None else atol,
            rtol=DEFAULT.rtol if rtol is None else rtol,
        )
        for name, kind in kinds.items()
        if kind in ("FP16", "BF16", "FP32", "FP64")
    }
    if shadow is not None and atol is None and rtol is None:
        made |= shadow.compare
    for text in thresholds:
        name, equals, number = text.rpartition("=")
        try:
            value = float(number)
        except ValueError:
            value = float("nan")
        if not equals or name not in kinds or value - value != 0:
            raise BadRequestError(
                f"--threshold {text!r}: write OUTPUT=NUMBER; outputs: {', '.join(kinds)}"
            )
        made[name] = Tolerance(threshold=value)
    return made


def _print(document: dict[str, Any]) -> None:
    say = output.console.print
    rows = document["rows"]
    say(
        f"{document['model']}: version {document['version']} against version"
        f" {document['against']}, {document['replayed']} requests, {rows['compared']} rows"
    )
    for name, side in document["ran"].items():
        median = side["median_run_s"]
        took = "" if median is None else f", median {median * 1e6:.0f} us a run"
        say(f"{name}: {side['run']} run, {side['captured']} answers as captured{took}")
    _print_outputs(document)
    errors = document["errors"]
    if any(errors.values()):
        say(
            f"failed: target alone {errors['target']}, against alone {errors['against']},"
            f" both {errors['both']}"
        )
    for example in document["examples"]:
        say(f"  {example}", markup=False)
    _print_left_out(document)
    _print_guards(document)


def _print_outputs(document: dict[str, Any]) -> None:
    right = ("rows", "differ", "percent", "median", "99 %", "largest")
    shown = output.table("output", *right, right=right)
    for name, entry in document["outputs"].items():
        shown.add_row(
            name,
            str(entry["rows"]),
            str(entry["rows_differ"]),
            f"{100 * entry['rows_differ'] / max(entry['rows'], 1):.4g}",
            *(_number(entry["quantiles"][level]) for level in ("50", "99")),
            _number(entry["largest"]),
        )
    output.console.print(shown)
    for name, entry in document["outputs"].items():
        if entry["problem"]:
            typer.echo(f"{name}: {entry['problem']}")
        if entry["worst"]:
            worst = ", ".join(
                f"{each['prediction']} ({_number(each['distance'])})" for each in entry["worst"]
            )
            typer.echo(f"{name}: furthest apart at {worst}")
    for name, each in document["differences"].items():
        if each["mean"] is not None:
            low, high = each["low"], each["high"]
            between = "" if low is None else f", from {low:.3g} to {high:.3g}"
            typer.echo(f"{name}: {each['mean']:+.3g} on average{between}")
    for each in document["worst_bins"][:5]:
        typer.echo(
            f"worst: {each['channel']} {each['bin']}: {each['differ']} of {each['rows']} rows,"
            f" {100 * each['share']:.1f} %"
        )


def _print_left_out(document: dict[str, Any]) -> None:
    for reason, n in document["left_out"].items():
        output.console.print(f"left out: {n} requests: {reason}", markup=False)
    if document["passed_over"]:
        output.console.print(f"passed over: {document['passed_over']}", markup=False)


def _print_guards(document: dict[str, Any]) -> None:
    guards = output.table("guard", "target", "against", "evidence", "needs", "fires")
    for entry in document["guards"]:
        guards.add_row(
            entry["guard"],
            "{hits} of {of}".format(**entry["candidate"]),
            "{hits} of {of}".format(**entry["control"]),
            f"{entry['evidence']:g}",
            f"{entry['evidence_needed']:g}",
            f"yes: {entry['action']}" if entry["breach"] else "no",
        )
    output.console.print(guards)
    output.console.print(f"verdict: {document['verdict']} ({document['reason']})", markup=False)


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"
