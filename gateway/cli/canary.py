"""`driftgate canary`: a candidate gets its traffic step by step, judged by evidence."""

import math
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any
from urllib.parse import quote

import typer

from gateway.cli import output
from gateway.cli.door import How, Where, change, takes
from gateway.errors import BadRequestError, ConfigError, NotFoundError

if TYPE_CHECKING:
    from registry.revisions import Revision

app = typer.Typer(
    no_args_is_help=True,
    help="Roll a version out step by step, judged by evidence.",
    rich_markup_mode=None,
)
BREACH = 5
"""Exit code: a guard has found what must not be."""
_STILL = ("done", "aborted", "failed")
_RATES = (0.05, 0.01, 0.001)

Model = Annotated[str, typer.Argument(help="Its name, or a rollout's id.")]
PlanFile = Annotated[
    Path | None, typer.Option("--plan", help="YAML or JSON; nothing: 1, 5, 20, 50 %.")
]


@app.command("plan")
def plan(
    requests_per_h: Annotated[
        float, typer.Option(min=0.001, help="Requests (or units, where sticky) in an hour.")
    ],
    plan_file: PlanFile = None,
    as_json: Annotated[bool, typer.Option("--json", help="As JSON.")] = False,
) -> None:
    """Say what each step can and cannot detect at this traffic."""
    from gateway.decision import guards_of
    from monitors.guards import power, verdict
    from registry.rollouts import Rollout

    read = plan_of(plan_file)
    whole = Rollout(id="", candidate=0, control=0, phase="step", plan=read)
    log_bound = verdict.log_bounds(guards_of(whole), read.alpha).get(
        "error_rate", math.log(1 / read.alpha)
    )
    found = []
    for step in read.steps:
        needed_h = step.units_min / (requests_per_h * step.weight / 100)
        hours = max(step.for_s / 3600, needed_h)
        requests = requests_per_h * hours
        sights = [
            power.Sight(
                requests,
                rate,
                power.detectable_ratio(requests, rate, step.weight / 100, log_bound=log_bound),
            )
            for rate in _RATES
        ]
        found.append({
            "weight": step.weight,
            "hours": round(hours, 2),
            "requests": round(requests),
            "detects": {
                f"{s.rate:g}": round(s.ratio, 2) if math.isfinite(s.ratio) else None
                for s in sights
            },
            "says": power.sentence(
                step.weight / 100, requests_per_h, round(hours, 1), sights
            ),
        })  # fmt: skip
    if as_json:
        output.print_json({"steps": found})
        return
    for entry in found:
        typer.echo(entry["says"])
    total_h = sum(float(entry["hours"]) for entry in found)
    typer.echo(f"all steps take {total_h:,.1f} h at least, and {read.bake_s / 3600:g} h of baking")


@app.command("start")
@takes(Where, How)
def start(
    model: Annotated[str, typer.Argument(help="Its name.")],
    version: Annotated[int, typer.Argument(min=1, help="The candidate.")],
    plan_file: PlanFile = None,
    *,
    where: Where,
    how: How,
) -> None:
    """Start rolling a version out; it begins once all workers have it warm."""
    import msgspec

    from registry import rollouts
    from registry.rollouts import Roll

    read = plan_of(plan_file)
    move = rollouts.starting(version, read, now=time.time())
    body = {"model": model, "version": version, "plan": msgspec.to_builtins(read)}
    change(
        where,
        how,
        lambda _: Roll(model, None, move=move),
        ("POST", "/admin/rollouts", body),
        notes=lambda made: _notes(where, model, version, made),
    )


@app.command("status")
@takes(Where)
def status(
    model: Model,
    watch: Annotated[
        bool, typer.Option("--watch", help="Until it ends, or waits for somebody.")
    ] = False,
    *,
    where: Where,
) -> None:
    """Print where a rollout is, and the evidence of each guard; exit 5 after a breach."""
    from gateway.cli import picture
    from gateway.decision import FOR_PEOPLE

    found = _status(where, model)
    if watch and not where.as_json:
        from rich.live import Live

        with Live(picture.of_rollout(found), console=output.console, refresh_per_second=4) as live:
            while found["phase"] not in _STILL and found.get("cause") not in FOR_PEOPLE:
                time.sleep(1.0)
                found = _status(where, model)
                live.update(picture.of_rollout(found))
    if where.as_json:
        output.print_json({**found, "next": picture.following(found)})
    elif not watch:
        output.console.print(picture.of_rollout(found))
    if is_breach(found):
        raise typer.Exit(BREACH)


@app.command("pause")
@takes(Where, How)
def pause(model: Model, *, where: Where, how: How) -> None:
    """Hold a rollout where it is."""
    _act("pause", model, where, how)


@app.command("resume")
@takes(Where, How)
def resume(model: Model, *, where: Where, how: How) -> None:
    """Let a rollout that holds go on."""
    _act("resume", model, where, how)


@app.command("advance")
@takes(Where, How)
def advance(model: Model, *, where: Where, how: How) -> None:
    """Take the next step now."""
    _act("advance", model, where, how)


@app.command("abort")
@takes(Where, How)
def abort(model: Model, *, where: Where, how: How) -> None:
    """Take all traffic from the candidate; while baking, roll back."""
    _act("abort", model, where, how)


@app.command("promote")
@takes(Where, How)
def promote(model: Model, *, where: Where, how: How) -> None:
    """Make the candidate champion now."""
    _act("promote", model, where, how)


def is_breach(found: dict[str, Any]) -> bool:
    """Whether a guard has found what must not be."""
    evidence = found.get("evidence") or {}
    breaches = any(guard.get("breach") for guard in evidence.get("guards", ()))
    return evidence.get("verdict") in ("breach", "invalid") or breaches


def _act(action: str, model: str, where: Where, how: How) -> None:
    from registry import rollouts
    from registry.errors import NotThereError
    from registry.rollouts import Roll

    def make(revisions: Any) -> Roll:
        found = rollouts.find(revisions.head().models, model)
        if found is None:
            raise NotThereError(f"no rollout {model[:80]!r}")
        return Roll(
            found[0], None, move=rollouts.asked(action, now=time.time(), reason=how.message)
        )

    body = {"message": how.message} if how.message else {}
    path = f"/admin/rollouts/{quote(model, safe='')}/{action}"
    change(where, how, make, ("POST", path, body))


def _notes(where: Where, model: str, version: int, made: "Revision") -> list[str]:
    from gateway.alarms import AlarmLog
    from gateway.controller import drifts_of, notes_of

    champion = made.models[model].aliases.get("champion", 0)
    drifts = drifts_of(AlarmLog(where.state_path / "alarms.jsonl", hold_off_s=0.0))
    return notes_of(drifts, model, (version, champion))


def _status(where: Where, model: str) -> dict[str, Any]:
    if where.server:
        answer: dict[str, Any] = where.call("GET", f"/admin/rollouts/{quote(model, safe='')}")
        return answer
    import msgspec

    from gateway.controller import report
    from registry import rollouts

    found = where.read(lambda revisions: rollouts.find(revisions.head().models, model))
    if found is None:
        raise NotFoundError(f"no rollout {model[:80]!r}")
    name, rollout = found
    tree: dict[str, Any] = msgspec.to_builtins(rollout)
    return {
        "model": name,
        "weight": rollout.weight,
        **tree,
        **report(where.state_path, rollout),
    }


def plan_of(file: Path | None) -> Any:
    """The plan in a file; the default one without.

    Raises
    ------
    ConfigError : every problem at once.
    """
    from registry import rollouts
    from registry.errors import RolloutError

    text = None
    if file is not None:
        try:
            text = file.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError):
            raise BadRequestError(f"{file}: cannot be read") from None
    try:
        return rollouts.parse_plan(text)
    except RolloutError as error:
        raise ConfigError(*error.problems) from None
