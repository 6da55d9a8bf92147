"""Every change through one door: nothing half done, nobody overruled unawares, all of it undone."""

import subprocess
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from registry import changes, routes, store
from registry.changes import (
    Alias,
    AlterMonitor,
    Applied,
    Change,
    DeleteAlias,
    DeleteRoute,
    Follow,
    Load,
    Pin,
    Promote,
    PutRoute,
    PutRoutes,
    RecordFollow,
    Restore,
    Rollback,
    SetReference,
    SetRollout,
    Unload,
    Unpin,
)
from registry.errors import (
    ChangeError,
    ConflictError,
    NotThereError,
    PreconditionError,
    ProtectedError,
    WriteError,
)
from registry.revisions import ModelState, Revision, Revisions
from registry.signature import Signature, TensorSpec
from tests.registry.test_revisions import python


class Fake:
    """A registry as a dictionary."""

    def __init__(self, models: Mapping[str, Sequence[int]]) -> None:
        self.there = {model: list(versions) for model, versions in models.items()}
        self.signatures: dict[tuple[str, int], Signature] = {}
        self.digests: dict[tuple[str, int], str] = {}
        self.answering: dict[str, int] = {}

    def models(self) -> Iterable[str]:
        return self.there

    def versions(self, model: str) -> Sequence[int]:
        return self.there.get(model, [])

    def digest(self, model: str, version: int) -> str:
        return self.digests.get((model, version), f"sha256:{model}-{version}")

    def signature(self, model: str, version: int) -> Signature | None:
        return self.signatures.get((model, version))

    def served(self, model: str) -> int | None:
        return self.answering.get(model)


class Desk:
    """Somebody who makes changes."""

    def __init__(self, directory: Path, known: Fake) -> None:
        self.revisions = Revisions(directory)
        self.known = known

    def do(self, change: Change, **options: Any) -> Applied:
        given = {"actor": "ana", "via": "cli", **options}
        return changes.apply(self.revisions, change, known=self.known, **given)

    def state(self, model: str = "fraud") -> ModelState:
        return self.revisions.head().models.get(model, ModelState())


@pytest.fixture
def desk(tmp_path: Path) -> Desk:
    return Desk(tmp_path, Fake({"fraud": [6, 7, 8, 9], "churn": [1, 2]}))


def split(**weights: float | str) -> routes.Route:
    shares = [{"to": to, "weight": weight} for to, weight in weights.items()]
    return routes.parse_one("fraud", {"unit": ["header:x-user", "request"], "split": shares})


def test_the_first_change_takes_the_wheel_with_the_version_served_now_as_champion(
    desk: Desk,
) -> None:
    """From then on publishing moves nothing; what is served does not change by it."""
    desk.known.answering["fraud"] = 8

    applied = desk.do(Alias("fraud", "challenger", 9))

    assert desk.state().follow is False
    assert desk.state().aliases == {"champion": 8, "challenger": 9}
    assert applied.moved == {"fraud": 0}
    assert applied.diff == (
        "fraud follow on -> off",
        "fraud challenger none -> 9",
        "fraud champion none -> 8",
    )


def test_promote_keeps_the_previous_champion_and_rollback_returns_to_it_once(desk: Desk) -> None:
    """Two people may press rollback at once: the second press changes nothing."""
    desk.do(Promote("fraud", 7))
    promoted = desk.do(Promote("fraud", 8))
    assert desk.state().aliases == {"champion": 8, "previous": 7}
    assert promoted.diff == ("fraud champion 7 -> 8", "fraud previous 9 -> 7")
    assert promoted.moved == {"fraud": 100}
    assert promoted.undo == "driftgate restore 1 fraud"

    back = desk.do(Rollback("fraud"))
    again = desk.do(Rollback("fraud"))

    assert desk.state().aliases["champion"] == 7
    assert (back.is_changed, again.is_changed) == (True, False)
    assert again.revision.number == back.revision.number == 3


def test_promoting_the_champion_again_writes_nothing(desk: Desk) -> None:
    """A deployment script may run twice."""
    desk.do(Promote("fraud", 8))

    assert not desk.do(Promote("fraud", 8)).is_changed
    assert desk.revisions.head().number == 1


def test_follow_returns_and_what_is_followed_is_recorded_until_somebody_takes_the_wheel(
    desk: Desk,
) -> None:
    """Servers record what they follow; a record never moves a model that somebody manages."""
    desk.do(Promote("fraud", 7))
    desk.do(Follow("fraud"))
    assert desk.state().follow

    assert changes.record_follow(desk.revisions, {"fraud": 9, "churn": 2}, desk.known)
    assert desk.state().aliases == {"champion": 9, "previous": 7}
    assert desk.state("churn").follow
    assert desk.revisions.head().actor == "follow"

    desk.do(Promote("fraud", 8))
    desk.do(RecordFollow({"fraud": 9}))
    assert desk.state().aliases["champion"] == 8


def test_a_route_draws_salts_once_and_moves_only_the_units_that_it_must(desk: Desk) -> None:
    """5 -> 20 percent moves 15; back again ends where it was; a dry run says so before."""
    desk.do(Alias("fraud", "challenger", 9))
    desk.known.answering["fraud"] = 7
    desk.do(Promote("fraud", 7))
    first = desk.do(PutRoute("fraud", split(champion="rest", challenger=5)))
    buckets, salts = desk.state().buckets, desk.state().salts
    assert first.moved == {"fraud": 5}
    assert {purpose: len(text) for purpose, text in salts.items()} == {
        "split": 32, "shadow": 32, "capture": 32,
    }  # fmt: skip
    assert len(set(salts.values())) == 3

    wider = split(champion="rest", challenger=20)
    tried = desk.do(PutRoute("fraud", wider), dry_run=True)
    assert tried.moved == {"fraud": 15}
    assert tried.diff == ("fraud split challenger 5 -> 20",)
    assert desk.state().buckets == buckets
    assert desk.do(PutRoute("fraud", wider)).moved == {"fraud": 15}
    assert desk.do(PutRoute("fraud", split(champion="rest", challenger=5))).moved == {"fraud": 15}
    assert (desk.state().buckets, desk.state().salts) == (buckets, salts)

    desk.do(DeleteRoute("fraud"))
    assert (desk.state().route, desk.state().buckets, desk.state().salts) == (None, "", salts)
    with pytest.raises(NotThereError, match="has no route"):
        desk.do(DeleteRoute("fraud"))


def test_promoting_behind_a_split_moves_the_units_of_the_champion_only(desk: Desk) -> None:
    """The challenger's units stay with the version they have."""
    desk.do(Promote("fraud", 7))
    desk.do(Alias("fraud", "challenger", 9))
    desk.do(PutRoute("fraud", split(champion="rest", challenger=25)))

    assert desk.do(Promote("fraud", 8), dry_run=True).moved == {"fraud": 75}
    assert desk.do(Promote("fraud", 9), dry_run=True).moved == {"fraud": 75}


def test_everything_that_is_wrong_is_said_and_nothing_is_written(desk: Desk) -> None:
    """Names that are not there, each with what was probably meant."""
    route = split(champion="rest", chalenger=5)
    desk.do(Alias("fraud", "challenger", 9))

    with pytest.raises(ChangeError, match="did you mean challenger"):
        desk.do(PutRoute("fraud", route))
    with pytest.raises(NotThereError, match="no model 'frad' here; did you mean 'fraud'"):
        desk.do(Promote("frad", 7))
    with pytest.raises(NotThereError, match="has no version 5; it has: 6, 7, 8, 9"):
        desk.do(Promote("fraud", 5))
    with pytest.raises(ChangeError, match="is no alias"):
        desk.do(Alias("fraud", "7", 7))
    with pytest.raises(NotThereError, match="no alias 'chalenger'; did you mean 'challenger'"):
        desk.do(DeleteAlias("fraud", "chalenger"))
    with pytest.raises(ChangeError, match="the champion answers"):
        desk.do(DeleteAlias("fraud", "champion"))
    with pytest.raises(ChangeError, match="no previous champion"):
        desk.do(Rollback("fraud"))
    with pytest.raises(ChangeError, match="1001 characters"):
        desk.do(Promote("fraud", 7), message="x" * 1001)
    assert desk.revisions.head().number == 1


def test_what_cannot_be_written_down_or_printed_is_refused(desk: Desk) -> None:
    """JSON has no infinity: a revision that nobody can read would stop every later change."""
    for plan in ({"tolerance": float("inf")}, {"sample": float("nan")}, {"note": "\ud800"}):
        with pytest.raises(ChangeError, match="cannot be written down"):
            desk.do(SetRollout("fraud", {"id": "r-1", "phase": "step", **plan}))
    for message in ("\x1b[31mred", "half \udcff"):
        with pytest.raises(ChangeError, match="cannot be printed"):
            desk.do(Promote("fraud", 7), message=message)
    route = routes.parse("fraud:\n  rules:\n  - {name: a, when: {field: {x: 1}}, to: 7}\n")
    assert desk.do(PutRoutes(route), message="two\n lines").revision.message == "two lines"


def test_an_alias_that_a_route_names_cannot_be_deleted(desk: Desk) -> None:
    """The whole document is checked, not only what was changed."""
    desk.do(Alias("fraud", "challenger", 9))
    desk.do(PutRoute("fraud", split(champion="rest", challenger=5)))

    with pytest.raises(ChangeError, match=r"split\[1\].to: there is no alias 'challenger'"):
        desk.do(DeleteAlias("fraud", "challenger"))


def test_a_version_that_has_gone_does_not_bar_other_changes(desk: Desk) -> None:
    """Somebody removed its directory by hand: what was named before may stay until it is mended."""
    desk.do(Alias("fraud", "old", 6))
    desk.do(Alias("fraud", "older", 6))
    desk.known.there["fraud"].remove(6)

    desk.do(Promote("churn", 1))
    desk.do(Promote("fraud", 8))
    desk.do(DeleteAlias("fraud", "old"))
    desk.do(DeleteAlias("fraud", "older"))

    assert desk.state().aliases == {"champion": 8, "previous": 9}


def test_a_version_whose_files_changed_is_not_named_again(desk: Desk) -> None:
    """A number stands for its bytes: restoring it would serve something else."""
    desk.do(Promote("fraud", 7))
    desk.do(Promote("fraud", 8))
    desk.do(Promote("fraud", 9))
    desk.known.digests["fraud", 7] = "sha256:other"

    with pytest.raises(ChangeError, match="version 7: its files are not those"):
        desk.do(Restore(desk.revisions.get(1), "fraud"))


def tensors(width: int, datatype: str = "FP32", **outputs: int) -> Signature:
    return Signature(
        (TensorSpec("x", datatype, (-1, width)),),
        tuple(TensorSpec(name, "FP32", (-1, n)) for name, n in outputs.items()),
    )


@pytest.mark.parametrize(
    ("found", "reason"),
    [
        (tensors(32, y=1), r"input 'x' has shape \[-1, 32\], not \[-1, 31\]"),
        (tensors(31, "FP64", y=1), "input 'x' is FP64, not FP32"),
        (tensors(31, z=1), "output 'y' is missing"),
        (tensors(31, y=2), r"output 'y' has shape \[-1, 2\]"),
        (
            Signature(
                (*tensors(31).inputs, TensorSpec("k", "INT64", (-1,))), tensors(31, y=1).outputs
            ),
            "input 'k' is new",
        ),
    ],
)
def test_a_version_that_does_not_fit_the_champions_clients_must_be_insisted_on(
    desk: Desk, found: Signature, reason: str
) -> None:
    """As champion or behind a route; a free alias that nobody is sent to may name anything."""
    desk.known.signatures = {("fraud", 7): tensors(31, y=1), ("fraud", 9): found}
    desk.known.answering["fraud"] = 7
    desk.do(Promote("fraud", 7))

    with pytest.raises(ProtectedError, match=f"version 9 does not fit.*{reason}.*--force"):
        desk.do(Promote("fraud", 9))
    desk.do(Alias("fraud", "challenger", 9))
    with pytest.raises(ProtectedError, match="version 9 does not fit"):
        desk.do(PutRoute("fraud", split(champion="rest", challenger=1)))
    desk.do(Promote("fraud", 9), force=True)
    assert desk.state().aliases["champion"] == 9


def test_a_version_that_takes_more_fits(desk: Desk) -> None:
    """A free axis takes what a fixed one took, and one more output hurts nobody."""
    desk.known.signatures = {("fraud", 7): tensors(31, y=1), ("fraud", 8): tensors(-1, y=1, z=3)}
    desk.known.answering["fraud"] = 7
    desk.do(Promote("fraud", 7))

    desk.do(Promote("fraud", 8))


def test_what_a_rollout_owns_is_taken_over_only_by_whoever_says_so(desk: Desk) -> None:
    """Its own steps go through; a promote, a route, a restore or a rollback of others does not."""
    desk.do(Promote("fraud", 6))
    desk.do(Promote("fraud", 7))
    owned = {"id": "r-1", "phase": "step", "step": 1}
    canary = split(champion="rest", canary=5)
    desk.do(SetRollout("fraud", owned, canary, {"canary": 9}), actor="rollout:r-1")
    desk.do(SetRollout("fraud", owned | {"step": 2}, split(champion="rest", canary=20)))

    for change in (
        Promote("fraud", 8),
        PutRoute("fraud", split(champion=100)),
        Rollback("fraud"),
        Follow("fraud"),
        Restore(desk.revisions.get(1), "fraud"),
        Unload("fraud"),
    ):
        with pytest.raises(ProtectedError, match="rollout r-1 owns its traffic"):
            desk.do(change)
    desk.do(Pin("fraud", 6))
    desk.do(Promote("fraud", 8), take_over=True)

    assert desk.state().rollout == owned | {
        "step": 2, "phase": "aborted", "cause": "taken over by ana",
    }  # fmt: skip
    desk.do(Promote("fraud", 6))


def test_unloading_takes_pins_and_leaves_names_and_loading_says_what_is_open(desk: Desk) -> None:
    """What a worker must have open: nothing of an unloaded model, else what is named or pinned."""
    desk.do(Alias("fraud", "blue", 6))
    desk.do(Load("fraud", 8))
    before = desk.state()
    assert (before.loaded, before.pins, before.needed) == (True, (8,), {9, 6, 8})
    applied = desk.do(Unload("fraud"))
    after = desk.state()
    assert (after.loaded, after.pins, after.needed) == (False, (), set())
    assert (after.aliases, after.follow) == (before.aliases, before.follow)
    assert applied.diff == ("fraud loaded yes -> no", "fraud pin 8 on -> none")
    assert not desk.do(Unload("fraud")).is_changed
    assert desk.do(Load("fraud")).diff == ("fraud loaded no -> yes",)
    assert desk.state().needed == {9, 6}
    for change in (Load("absent"), Unload("absent"), Load("fraud", 77)):
        with pytest.raises(NotThereError):
            desk.do(change)


def test_what_must_be_open_is_what_answers_and_a_lost_way_back_bars_no_way_on(desk: Desk) -> None:
    """Aliases of who has taken the wheel, what a route names under follow too; `previous` may be
    gone."""
    desk.do(Promote("fraud", 6))
    desk.do(Promote("fraud", 7))
    assert (desk.state().needed, desk.state().required) == ({6, 7}, {7})
    desk.do(Alias("fraud", "blue", 9))
    route = routes.parse_one(
        "fraud",
        {"split": [{"to": "champion", "weight": "rest"}, {"to": 8, "weight": 5}],
         "fallback": {"to": ["previous"], "on": ["error"]}},
    )  # fmt: skip
    desk.do(PutRoute("fraud", route))
    assert (desk.state().needed, desk.state().required) == ({6, 7, 8, 9}, {7, 8, 9})
    desk.do(Follow("fraud"))
    assert (desk.state().needed, desk.state().required) == ({6, 8}, {8})


def test_a_rollback_ends_a_rollout_that_bakes(desk: Desk) -> None:
    """Nothing has to be aborted first when the new champion turns out bad."""
    desk.do(Promote("fraud", 7))
    baking = {"id": "r-1", "phase": "baking"}
    desk.do(SetRollout("fraud", baking, None, {"champion": 9}))
    assert desk.state().aliases == {"champion": 9, "previous": 7}

    desk.do(Rollback("fraud"))

    assert desk.state().aliases["champion"] == 7
    assert desk.state().rollout == {"id": "r-1", "phase": "aborted", "cause": "rolled back"}


def test_restore_brings_back_everything_but_rollouts_that_are_over(desk: Desk) -> None:
    """Salts and buckets too, so that everybody is where they were; for one model, or for all."""
    desk.do(Promote("fraud", 7))
    canary = split(champion=95, canary=5)
    desk.do(SetRollout("fraud", {"id": "r-1", "phase": "step"}, canary, {"canary": 9}))
    old = desk.revisions.head().models["fraud"]
    desk.do(SetRollout("fraud", {"id": "r-1", "phase": "done"}, split(champion=100)))
    desk.do(Promote("churn", 1))
    desk.do(Pin("fraud", 6))
    desk.do(AlterMonitor("fraud", {"tolerance": 0.02}))
    desk.do(SetReference("fraud", 7, "sha256:00"))

    applied = desk.do(Restore(desk.revisions.get(2), "fraud"), message="canary was fine")

    now = desk.state()
    assert now.rollout == {"id": "r-1", "phase": "done"}
    assert (now.aliases, now.pins, now.buckets, now.salts, now.monitor, now.reference) == (
        old.aliases, (), old.buckets, old.salts, None, {},
    )  # fmt: skip
    assert desk.state("churn").aliases == {"champion": 1, "previous": 2}
    assert applied.undo == "driftgate restore 7 fraud"
    desk.do(Restore(desk.revisions.get(0)))
    assert set(desk.revisions.head().models) == {"fraud"}  # what is over is remembered
    assert desk.state().follow


def test_the_undo_command_takes_back_each_kind_of_change(desk: Desk) -> None:
    """Restoring the revision that the command names leaves no difference to before."""
    made: list[Change] = [
        Promote("fraud", 7),
        Promote("fraud", 8),
        Alias("fraud", "challenger", 9),
        PutRoute("fraud", split(champion="rest", challenger=5)),
        DeleteRoute("fraud"),
        DeleteAlias("fraud", "challenger"),
        Rollback("fraud"),
        Pin("fraud", 6),
        Unpin("fraud", 6),
        SetReference("fraud", 7, "sha256:00"),
        SetReference("fraud", 7, None),
        AlterMonitor("fraud", {"sample": 10}),
        Follow("fraud"),
    ]
    for change in made:
        before = desk.revisions.head().models
        applied = desk.do(change)
        assert applied.is_changed, change
        after = desk.revisions.head().models
        *_, restore, number, model = applied.undo.split()
        assert restore == "restore"
        undone = desk.do(Restore(desk.revisions.get(int(number)), model))
        assert desk.revisions.head().models == before, change
        desk.do(Restore(desk.revisions.get(int(undone.undo.split()[2])), model))
        assert desk.revisions.head().models == after, change


def test_changes_of_two_models_commute_and_of_one_model_conflict_with_a_name(
    desk: Desk, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between reading and writing somebody else is faster."""
    other = Desk(tmp_path, desk.known)
    append = Revisions.append

    def slower(revisions: Revisions, revision: Revision, meanwhile: Change, actor: str) -> bool:
        monkeypatch.setattr(Revisions, "append", append)
        other.do(meanwhile, actor=actor)
        return append(revisions, revision)

    def first(meanwhile: Change, actor: str = "ben") -> None:
        monkeypatch.setattr(
            Revisions, "append", lambda self, made: slower(self, made, meanwhile, actor)
        )

    first(Promote("churn", 1))
    applied = desk.do(Promote("fraud", 7))
    assert applied.revision.number == 2
    assert applied.undo == "driftgate restore 1 fraud"
    assert desk.state("churn").aliases["champion"] == 1

    first(Promote("fraud", 8))
    with pytest.raises(ConflictError, match=r"revision 3 by ben \(cli\): fraud champion 7 -> 8"):
        desk.do(Promote("fraud", 9))
    assert desk.state().aliases["champion"] == 8

    first(Promote("churn", 2))
    with pytest.raises(PreconditionError, match=r"revision 4 .*churn champion 1 -> 2"):
        desk.do(Promote("fraud", 9), if_match=3)

    desk.do(Follow("fraud"))
    first(RecordFollow({"fraud": 9}), actor="follow")
    assert desk.do(Promote("fraud", 7)).is_changed  # a record is no decision of anybody's


@pytest.mark.parametrize("n_others", [100, None])
def test_who_loses_a_race_goes_on_while_others_win_and_gives_up_in_time(
    desk: Desk, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, n_others: int | None
) -> None:
    """A hundred others are overtaken at last; those that never end are heard of."""
    other = Desk(tmp_path, desk.known)
    append, won = Revisions.append, 0
    monkeypatch.setattr(changes, "_RACE_S_MAX", 60.0 if n_others else 0.2)

    def slower(revisions: Revisions, revision: Revision) -> bool:
        nonlocal won
        if won == n_others:
            return append(revisions, revision)
        won += 1
        monkeypatch.setattr(Revisions, "append", append)
        other.do(Promote("churn", 1 + won % 2), actor="ben")
        monkeypatch.setattr(Revisions, "append", slower)
        return append(revisions, revision)

    monkeypatch.setattr(Revisions, "append", slower)
    if n_others:
        assert desk.do(Promote("fraud", 7)).revision.number == n_others + 1
        return
    with pytest.raises(ConflictError, match=r"others were faster for 0\.2 s; try again"):
        desk.do(Promote("fraud", 7))
    monkeypatch.setattr(Revisions, "append", append)
    assert won > 1
    assert desk.revisions.head().number == won


def test_if_match_of_another_revision_says_who_changed_what_since(desk: Desk) -> None:
    """Optimistic concurrency for people: nothing is written on a state they have not seen."""
    desk.do(Promote("fraud", 7))
    desk.do(Promote("fraud", 8), actor="ben", via="http")

    with pytest.raises(PreconditionError) as caught:
        desk.do(Promote("fraud", 9), if_match=1)

    assert str(caught.value).startswith("revision 2 is in force, not 1; revision 2 by ben (http):")
    assert desk.do(Promote("fraud", 9), if_match=2).revision.number == 3


def test_a_disk_that_cannot_be_written_changes_nothing(
    desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And what servers follow is not recorded, without a word."""
    desk.do(Promote("fraud", 7))

    def full(_: str) -> None:
        raise OSError(28, "no space")

    monkeypatch.setattr(store, "steps", full)
    with pytest.raises(WriteError):
        desk.do(Promote("fraud", 8))
    assert not changes.record_follow(desk.revisions, {"churn": 2}, desk.known)
    monkeypatch.setattr(store, "steps", lambda _: None)
    assert Revisions(desk.revisions._state_dir).head().models["fraud"].aliases["champion"] == 7


def test_a_revision_tells_when_who_and_why(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    """UTC to the millisecond."""
    monkeypatch.setattr(changes, "clock", lambda: datetime(2026, 11, 25, 10, 2, 11, 500, UTC))

    made = desk.do(Promote("fraud", 7), actor="key:00aa11bb", via="http", message="RISK-118")

    assert (made.revision.time, made.revision.actor) == ("2026-11-25T10:02:11.000Z", "key:00aa11bb")
    assert (made.revision.via, made.revision.message) == ("http", "RISK-118")


RACER = """
import sys
from pathlib import Path
from registry import changes
from registry.errors import ConflictError
from registry.revisions import Revisions
from tests.registry.test_changes import Desk, Fake

directory, me, n = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
desk = Desk(directory, Fake({me: range(1, n + 1), "shared": range(1, 1000)}))
print("ready", flush=True)
sys.stdin.readline()
won = 0
for k in range(1, n + 1):
    desk.do(changes.Promote(me, k), actor=me)
    try:
        won += desk.do(changes.Pin("shared", 100 * int(me[1:]) + k), actor=me).is_changed
    except ConflictError as error:
        assert "shared pin" in str(error), error
print(won)
"""


@pytest.mark.parametrize("n_writers", [2, 8])
def test_racing_writers_lose_no_change_of_their_own_and_hear_of_every_conflict(
    tmp_path: Path, n_writers: int
) -> None:
    """Own models commute; of the shared one, exactly what was accepted is there."""
    n = 24 // n_writers
    writers = [python(RACER, str(tmp_path), f"m{k}", str(n)) for k in range(n_writers)]
    won = 0
    for writer in writers:
        assert writer.stdout is not None
        assert writer.stdout.readline() == "ready\n"
    for writer in writers:
        _start(writer)
    for writer in writers:
        printed, _ = writer.communicate(timeout=60)
        assert writer.returncode == 0
        won += int(printed)

    revisions = Revisions(tmp_path)
    head = revisions.head()

    assert [revision.number for revision in revisions.history()] == list(range(head.number, 0, -1))
    assert revisions.verify() == []
    assert all(head.models[f"m{k}"].aliases["champion"] == n for k in range(n_writers))
    assert len(head.models["shared"].pins) == won


def _start(writer: "subprocess.Popen[str]") -> None:
    assert writer.stdin is not None
    writer.stdin.write("go\n")
    writer.stdin.flush()


class Life(RuleBasedStateMachine):
    """A registry in use, against a dictionary: who answers, and what each revision said."""

    model = st.sampled_from(["a", "b"])

    def __init__(self) -> None:
        super().__init__()
        import tempfile

        self.folder = tempfile.TemporaryDirectory()
        self.desk = Desk(Path(self.folder.name), Fake({"a": [1], "b": [1]}))
        self.aliases: dict[str, dict[str, int]] = {"a": {}, "b": {}}
        self.managed: dict[str, bool] = {"a": False, "b": False}
        self.past: list[Any] = [self.snapshot()]

    def snapshot(self) -> Any:
        return {m: (dict(self.aliases[m]), self.managed[m]) for m in ("a", "b")}

    def teardown(self) -> None:
        self.folder.cleanup()

    def take_wheel(self, model: str) -> None:
        if not self.managed[model]:
            recorded = self.aliases[model].get("champion")
            self.aliases[model]["champion"] = recorded or self.desk.known.there[model][-1]
            self.managed[model] = True

    def done(self, applied: Applied) -> None:
        if applied.is_changed:
            self.past.append(self.snapshot())
        assert applied.revision.number == len(self.past) - 1

    @rule(model=model)
    def publish(self, model: str) -> None:
        self.desk.known.there[model].append(len(self.desk.known.there[model]) + 1)

    @rule(model=model, data=st.data())
    def promote(self, model: str, data: st.DataObject) -> None:
        version = data.draw(st.sampled_from(self.desk.known.there[model]))
        self.take_wheel(model)
        if (before := self.aliases[model]["champion"]) != version:
            self.aliases[model] |= {"previous": before, "champion": version}
        self.done(self.desk.do(Promote(model, version)))

    @rule(model=model, alias=st.sampled_from(["canary", "shadow"]), data=st.data())
    def alias(self, model: str, alias: str, data: st.DataObject) -> None:
        version = data.draw(st.sampled_from(self.desk.known.there[model]))
        self.take_wheel(model)
        self.aliases[model][alias] = version
        self.done(self.desk.do(Alias(model, alias, version)))

    @precondition(lambda self: any("previous" in names for names in self.aliases.values()))
    @rule(model=model)
    def rollback(self, model: str) -> None:
        if "previous" in self.aliases[model]:
            self.take_wheel(model)
            self.aliases[model]["champion"] = self.aliases[model]["previous"]
            self.done(self.desk.do(Rollback(model)))

    @rule(model=model)
    def follow(self, model: str) -> None:
        self.managed[model] = False
        self.done(self.desk.do(Follow(model)))

    @rule(model=model)
    def record(self, model: str) -> None:
        highest = self.desk.known.there[model][-1]
        if not self.managed[model]:
            before = self.aliases[model].get("champion")
            if before not in (None, highest):
                self.aliases[model]["previous"] = before
            self.aliases[model]["champion"] = highest
        self.done(self.desk.do(RecordFollow({model: highest}), actor="follow"))

    @rule(model=st.sampled_from(["a", "b", None]), data=st.data())
    def restore(self, model: str | None, data: st.DataObject) -> None:
        number = data.draw(st.integers(0, len(self.past) - 1))
        for name in ("a", "b") if model is None else (model,):
            aliases, managed = self.past[number][name]
            self.aliases[name], self.managed[name] = dict(aliases), managed
        self.done(self.desk.do(Restore(self.desk.revisions.get(number), model)))

    @invariant()
    def document_says_what_was_done(self) -> None:
        for reader in (self.desk.revisions, Revisions(Path(self.folder.name))):
            head = reader.head()
            assert head.number == len(self.past) - 1
            for model in ("a", "b"):
                state = head.models.get(model, ModelState())
                assert state.aliases == self.aliases[model]
                assert state.follow is not self.managed[model]
                assert set(state.digests) == {str(n) for n in state.aliases.values()}

    @invariant()
    def chain_is_whole(self) -> None:
        assert self.desk.revisions.verify() == []


TestLife = Life.TestCase
TestLife.settings = settings(
    max_examples=25,
    stateful_step_count=15,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow],
)
