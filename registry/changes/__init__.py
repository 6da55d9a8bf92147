"""The one door: every change of what is in force, as a function from document to document.

A change is made on the newest revision, the whole document is checked, and the next number is
created if absent. Who was slower looks again: a change of another model is simply made anew, one
of the same model is refused with the name of who was faster. Undo is a change like any other.
"""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from registry.changes.check import OVER, check_readable, checked
from registry.changes.differences import (
    FOLLOW,
    conflicting,
    differences,
    log,
    models_touched,
    moved,
    since,
    undo_of,
)
from registry.changes.kinds import (
    Alias,
    AlterMonitor,
    Change,
    DeleteAlias,
    DeleteMonitor,
    DeleteRoute,
    DeleteShadow,
    Follow,
    Load,
    Pin,
    Promote,
    PutRoute,
    PutRoutes,
    PutShadow,
    RecordFollow,
    Restore,
    Rollback,
    SetReference,
    SetRollout,
    Unload,
    Unpin,
    routed,
)
from registry.changes.known import Known, Models, OnDisk, champion, managed
from registry.errors import ChangeError, ConflictError, PreconditionError, RegistryError
from registry.revisions import FORMAT, PREVIOUS, Revision, Revisions

__all__ = [
    "FOLLOW", "OVER", "PREVIOUS",
    "Alias", "AlterMonitor", "Applied", "Change", "DeleteAlias", "DeleteMonitor", "DeleteRoute",
    "DeleteShadow", "Follow", "Known",
    "Load", "Models", "OnDisk", "Pin", "Promote", "PutRoute", "PutRoutes", "PutShadow",
    "RecordFollow", "Restore", "Rollback", "SetReference", "SetRollout", "Unload",
    "Unpin",
    "apply", "champion", "differences", "log", "managed", "moved", "record_follow", "routed",
    "undo_of",
]  # fmt: skip

_RACE_S_MAX = 10.0
"""A change that others keep overtaking, each of another model, goes on for so long."""
_MESSAGE_MAX = 1000


@dataclass(frozen=True, slots=True)
class Applied:
    """What came of a change."""

    revision: Revision
    """In force now; of a dry run: what would be."""
    diff: tuple[str, ...]
    """A line for each thing that is different."""
    moved: Mapping[str, float]
    """By model: percent of its units that another version answers than before."""
    undo: str
    """The command that takes it back."""
    is_changed: bool
    """Whether there was anything to change."""

    def document(self, *, dry_run: bool = False) -> dict[str, Any]:
        """As programs are told it, by every way."""
        return {
            "revision": self.revision.number,
            "changed": self.is_changed,
            "dry_run": dry_run,
            "diff": list(self.diff),
            "moved": {model: round(percent, 2) for model, percent in self.moved.items()},
            "undo": self.undo,
        }


def apply(
    revisions: Revisions,
    change: Change,
    *,
    known: Known,
    actor: str,
    via: str,
    message: str = "",
    if_match: int | None = None,
    dry_run: bool = False,
    force: bool = False,
    take_over: bool = False,
) -> Applied:
    """Make a change, and write it as the next revision.

    Parameters
    ----------
    if_match : the revision that must be in force; None: any
    dry_run : write nothing
    force : also to a version whose signature is another than the champion's
    take_over : also what a rollout owns; the rollout is over then

    Raises
    ------
    ChangeError : with every problem; NotThereError, ProtectedError for those kinds.
    ConflictError, PreconditionError : somebody else has changed it; says who, and what.
    WriteError : it could not be written; nothing is changed.
    RevisionError : what is in force cannot be read.
    """
    message = " ".join(message.split())
    if len(message) > _MESSAGE_MAX:
        raise ChangeError(f"message: {len(message)} characters; {_MESSAGE_MAX} are allowed")
    if not message.isprintable():
        raise ChangeError("message: holds characters that cannot be printed")
    head = revisions.head()
    if if_match is not None and head.number != if_match:
        raise PreconditionError(since(revisions, if_match, head))
    give_up = time.monotonic() + _RACE_S_MAX
    while True:
        models = checked(head.models, change, known, force=force, take_over=take_over, actor=actor)
        touched = models_touched(head.models, models)
        if not touched:
            return Applied(head, (), {}, "", is_changed=False)
        made = Revision(
            format=FORMAT,
            number=revisions.free_number,
            parent=head.number,
            parent_digest=head.digest,
            time=_now(),
            actor=actor,
            via=via,
            message=message,
            models=dict(models),
        )
        check_readable(made)
        applied = Applied(
            made,
            tuple(differences(head.models, models)),
            {model: moved(model, head.models, models, known) for model in sorted(touched)},
            undo_of(head, touched),
            is_changed=True,
        )
        if dry_run or revisions.append(made):
            return applied
        newer = revisions.head()
        if if_match is not None:
            raise PreconditionError(since(revisions, if_match, newer))
        is_record = isinstance(change, RecordFollow)  # passes by who has taken the wheel
        if not is_record and (others := conflicting(revisions, head, newer, touched)):
            raise ConflictError("; ".join(others))
        if time.monotonic() > give_up:
            raise ConflictError(f"others were faster for {_RACE_S_MAX:g} s; try again")
        head = newer


def record_follow(revisions: Revisions, moves: Mapping[str, int], known: Known) -> bool:
    """Write down which versions are followed, if that can be written; say whether it is.

    What is followed is served all the same: a registry may be read-only, or its disk full.
    """
    try:
        apply(revisions, RecordFollow(moves), known=known, actor=FOLLOW, via="sync", force=True)
    except RegistryError:
        return False
    return True


def _utc() -> datetime:
    return datetime.now(UTC)


clock: Callable[[], datetime] = _utc
"""What tells the time of a revision; tests set it."""


def _now() -> str:
    return clock().isoformat(timespec="milliseconds").replace("+00:00", "Z")
