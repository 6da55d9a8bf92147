"""What is different between two documents, who changed it, and whose traffic moves."""

from collections.abc import Iterable, Iterator, Mapping, Sequence

import msgspec

from registry import buckets, routes
from registry.buckets import Buckets
from registry.changes.known import Known, Models, champion
from registry.errors import RevisionError
from registry.revisions import ModelState, Revision, Revisions
from registry.routes import CHAMPION

FOLLOW = "follow"
"""The actor of revisions that only record which version is followed: they conflict with nothing."""


def log(
    revisions: Revisions, limit: int, model: str | None = None
) -> list[tuple[Revision, list[str]]]:
    """The newest revisions, each with what it changed; of one model, or of all.

    Raises
    ------
    RevisionError : what is in force cannot be read.
    """
    head = revisions.head()
    touched = None if model is None else {model}
    found = _changes_since(revisions, 0, head, touched)
    return [entry for entry, _ in zip(found, range(limit), strict=False)]


def moved(model: str, before: Models, after: Models, known: Known) -> float:
    """Percent of a model's units that another version answers than before, by its split."""
    was = _answering(model, before, known)
    now = _answering(model, after, known)
    if was[1] == now[1] or len(set(was[0])) == 1 or len(set(now[0])) == 1:
        n = sum(a != b for a, b in zip(was[0], now[0], strict=True))
        return n * 100 / buckets.N
    # Another salt shuffles everybody: who stays does so by chance.
    same = sum(was[0].count(version) * now[0].count(version) for version in {*was[0]} & {*now[0]})
    return 100 - same * 100 / buckets.N**2


def differences(before: Models, after: Models) -> list[str]:
    """A line for each thing that two documents say differently; tables and salts are left out."""
    lines: list[str] = []
    for model in sorted({*before, *after}):
        was, now = (dict(_leaves(side.get(model, ModelState()))) for side in (before, after))
        for key in dict.fromkeys([*was, *now]):
            old, new = was.get(key, "none"), now.get(key, "none")
            if old != new:
                lines.append(f"{model} {key} {old} -> {new}")
    return lines


def undo_of(head: Revision, touched: Iterable[str]) -> str:
    """The command that takes a change back which was made on `head`."""
    changed = sorted(touched)
    of_one = f" {changed[0]}" if len(changed) == 1 else ""
    return f"driftgate restore {head.number}{of_one}"


def _answering(model: str, models: Models, known: Known) -> tuple[list[int | None], str]:
    """(10 000,) the version that answers each bucket, and the salt of the split."""
    state = models.get(model, ModelState())
    answers = champion(model, state, known)
    if not state.buckets:
        return [answers] * buckets.N, ""
    table = Buckets.parse(state.buckets)
    versions = [
        answers if name == CHAMPION else version_of(state, int(name) if name.isdigit() else name)
        for name in table.names
    ]
    return [versions[index] for index in table.owners], state.salts.get("split", "")


def version_of(state: ModelState, to: int | str) -> int | None:
    """The version behind a number or an alias; None where nothing has that name."""
    return to if isinstance(to, int) else state.aliases.get(to)


def models_touched(before: Models, after: Models) -> set[str]:
    """Models that two documents say different things of."""
    return {model for model in {*before, *after} if before.get(model) != after.get(model)}


def conflicting(
    revisions: Revisions, base: Revision, newer: Revision, touched: set[str]
) -> list[str]:
    """What others changed of the same models since `base`."""
    return [
        _told(revision, lines)
        for revision, lines in _changes_since(revisions, base.number, newer, touched)
        if revision.actor != FOLLOW
    ]


def _changes_since(
    revisions: Revisions, number: int, head: Revision, touched: set[str] | None
) -> Iterator[tuple[Revision, list[str]]]:
    """Revisions after `number`, newest first, that changed these models (None: any), and how."""
    while head.number > number:
        try:
            parent = revisions.get(head.parent)
        except RevisionError:
            return
        changed = models_touched(parent.models, head.models)
        if touched is None or changed & touched:
            chosen = changed if touched is None else changed & touched
            yield head, differences(_only(chosen, parent.models), _only(chosen, head.models))
        head = parent


def _only(chosen: set[str], models: Models) -> Models:
    return {model: state for model, state in models.items() if model in chosen}


def since(revisions: Revisions, wanted: int, head: Revision) -> str:
    """The sentence of a precondition that does not hold."""
    first = f"revision {head.number} is in force, not {wanted}"
    told = []
    for revision, lines in _changes_since(revisions, wanted, head, None):
        told.append(_told(revision, lines))
        if len(told) == 5:
            break
    return "; ".join([first, *told])


def _told(revision: Revision, lines: Sequence[str]) -> str:
    more = f" and {len(lines) - 3} more" if len(lines) > 3 else ""
    what = ", ".join(lines[:3]) or "nothing that shows"
    return f"revision {revision.number} by {revision.actor} ({revision.via}): {what}{more}"


def _leaves(state: ModelState) -> Iterator[tuple[str, str]]:
    """What people see of a state, flat."""
    yield "follow", "on" if state.follow else "off"
    if state.loaded is not None:
        yield "loaded", "yes" if state.loaded else "no"
    yield from ((alias, str(n)) for alias, n in sorted(state.aliases.items()))
    yield from ((f"pin {version}", "on") for version in state.pins)
    yield from ((f"reference {n}", text[:19]) for n, text in sorted(state.reference.items()))
    if state.route is not None:
        document = routes.document(state.route)
        for share in document.pop("split", []):
            yield f"split {share['to']}", str(share["weight"])
        yield from _flat("route", document)
    yield from _flat("monitor", state.monitor)
    yield from _flat("rollout", state.rollout)


def _flat(where: str, value: object) -> Iterator[tuple[str, str]]:
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _flat(f"{where}.{key}", inner)
    elif isinstance(value, list | tuple) and any(isinstance(v, Mapping) for v in value):
        for k, inner in enumerate(value):
            yield from _flat(f"{where}[{k}]", inner)
    elif value is not None:
        yield where, msgspec.json.encode(value).decode()
