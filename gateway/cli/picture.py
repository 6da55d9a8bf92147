"""A rollout as people read it: where it is, what each guard has found, what is still needed."""

import time
from typing import Any

import msgspec
from rich.console import Group, RenderableType
from rich.text import Text

from gateway.cli import output
from registry.rollouts import Plan, Step

_ENDED = ("done", "aborted", "failed")


def of_rollout(found: dict[str, Any]) -> RenderableType:
    """What `GET /admin/rollouts/{id}` says, as a few lines and a table."""
    evidence = found.get("evidence") or {}
    lines = [Text(_head(found))]
    said = str(evidence.get("reason", ""))
    if found["phase"] in _ENDED or found["phase"] == "holding" or not said:
        said = str(found.get("reason", ""))
    lines.append(Text(said))
    if found["phase"] not in _ENDED:
        lines.extend(_progress(found, evidence))
        lines.append(Text(f"next: {following(found)}"))
    guards = evidence.get("guards", ())
    lines.extend(Text(_outcome(each)) for each in guards if each.get("outcome"))
    for host, about in (evidence.get("labels") or {}).items():
        if about.get("problem"):
            lines.append(Text(f"labels of {host}: {about['problem']}"))
    return Group(*lines, _table(guards)) if guards else Group(*lines)


def following(found: dict[str, Any]) -> str:
    """What a rollout waits for, and who ends that: a sentence for people, and for `--json`."""
    if found["phase"] in _ENDED:
        return "nothing: it is over"
    needs = (found.get("evidence") or {}).get("needs") or []
    if found["phase"] != "holding":
        wanted = "; ".join(needs) or "the controller's next look"
        return {
            "preparing": "the first weight, once every live worker has the candidate warm",
            "shadowing": f"the first step, after: {wanted}",
            "baking": f"done, after: {wanted}",
        }.get(found["phase"], f"the next step, after: {wanted}")
    model = found["model"]
    abort = f"driftgate canary abort {model}"
    return {
        "manual": f"driftgate canary resume {model} (or advance, promote); {abort}",
        "breach": f"look at the guard; meant: driftgate canary resume {model}; not meant: {abort}",
        "invalid": "find what answers or chooses in place of the gateway (a cache, retries, a lost"
        f" header); then {abort} and start again, or driftgate canary resume {model}",
        "drift": f"it goes on when no alarm is open: driftgate alarm list {model}, then driftgate"
        f" alarm ack ID, or driftgate drift accept {model}",
        "inconclusive": "it goes on when it has what it needs; or"
        f" driftgate canary advance {model}; {abort}",
        "window": "it goes on at the next hour of its window",
        "workers": "it goes on when every live worker has the candidate (driftgate doctor)",
    }.get(str(found.get("cause")), f"driftgate canary resume {model}")


def _head(found: dict[str, Any]) -> str:
    cause = f" ({found['cause']})" if found.get("cause") else ""
    at = found.get("held") or found["phase"]
    n = len(_steps(found))
    where = f" step {found.get('step', 0) + 1} of {n}" if at == "step" and n else ""
    if found["phase"] == "step" and where:
        phase = where.strip()
    else:
        phase = f"{found['phase']}{cause}" + (f" in{where}" if where else "")
    return (
        f"{found['model']}: {found['id']}, version {found['candidate']} against"
        f" {found['control']}: {phase}, {found['weight']:g} %"
    )


def _progress(found: dict[str, Any], evidence: dict[str, Any]) -> list[Text]:
    """How much of its time and of its units a step has had."""
    steps = _steps(found)
    if not evidence or (found.get("held") or found["phase"]) != "step" or not steps:
        return []
    step = steps[min(found.get("step", 0), len(steps) - 1)]
    elapsed_s = max(time.time() - found["since"], 0.0)
    seen = (
        ("time", elapsed_s, step.for_s, "s"),
        ("units", evidence.get("units", 0), step.units_min, "of the candidate"),
    )
    return [
        Text(f"{name:<6}{output.gauge(have, full or 1, 20)} {have:,.0f} of {full:,.0f} {of}")
        for name, have, full, of in seen
    ]


def _steps(found: dict[str, Any]) -> tuple[Step, ...]:
    """Steps of its plan, with what the plan did not say."""
    plan = found.get("plan")
    return () if plan is None else msgspec.convert(plan, Plan).steps


def _outcome(guard: dict[str, Any]) -> str:
    outcome = guard["outcome"]
    if outcome["difference"] is None:
        return (
            f"{guard['guard']}: {guard['candidate']['of']} and {guard['control']['of']} units"
            " have a label; a hundred of each are needed for an interval"
        )
    best, low, high = outcome["difference"]
    return (
        f"{guard['guard']}: candidate {outcome['candidate']:g}, control {outcome['control']:g}"
        f" ({outcome['better']} is better): difference {best:g}, between {low:g} and {high:g} at"
        f" every look; one below {outcome['detectable']:.3g} could not be seen yet"
    )


def _table(guards: Any) -> RenderableType:
    table = output.table(
        "guard", "evidence", "", "of needed", "candidate", "control", "ratio",
        right=("of needed", "candidate", "control", "ratio"),
    )  # fmt: skip
    for guard in guards:
        candidate, control = guard["candidate"], guard["control"]
        table.add_row(
            guard["guard"],
            output.gauge(guard["share_of_bound"], 1.0),
            f"{guard['action']}!" if guard["breach"] else "",
            f"{guard['evidence']:.3g} of {guard['evidence_needed']:.3g}",
            f"{candidate['hits']} of {candidate['of']}",
            f"{control['hits']} of {control['of']}",
            _ratio(guard.get("ratio")),
        )
    return table


def _ratio(ratio: Any) -> str:
    if not ratio or ratio[0] is None:
        return ""
    low, high = (f"{value:.2g}" if value is not None else "∞" for value in ratio[1:])
    return f"{ratio[0]:.2g} ({low} to {high})"
