"""The chain of revisions: one winner a number, nothing torn in force, nothing changed unnoticed."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from registry import store
from registry.errors import (
    NewerFormatError,
    RevisionError,
    RevisionNotFoundError,
    WriteError,
)
from registry.revisions import EMPTY, ModelState, Revision, Revisions, digest_of, read


def after(head: Revision, **changes: int) -> Revision:
    """The revision behind `head`, with these versions as champions."""
    models = {
        **head.models,
        **{
            model: ModelState(follow=False, aliases={"champion": version})
            for model, version in changes.items()
        },
    }
    return Revision(
        format=1,
        number=head.number + 1,
        parent=head.number,
        parent_digest=head.digest,
        time="2026-11-25T10:00:00Z",
        actor="ana",
        via="cli",
        message=f"{changes}",
        models=models,
    )


def chain(directory: Path, n: int) -> Revisions:
    """A state directory with revisions 1 to n: champion of `fraud` is the revision's number."""
    revisions = Revisions(directory)
    for number in range(1, n + 1):
        assert revisions.append(after(revisions.head(), fraud=number))
    return Revisions(directory)


def file_of(directory: Path, number: int) -> Path:
    return directory / "revisions" / f"{number:08d}.json"


def champion(revision: Revision) -> int:
    return revision.models["fraud"].aliases["champion"]


def test_before_the_first_change_revision_0_is_in_force_and_nothing_is_written(
    tmp_path: Path,
) -> None:
    """A registry that may only be read can be served."""
    revisions = Revisions(tmp_path / "state")

    assert revisions.head() == EMPTY
    assert revisions.history() == []
    assert not (tmp_path / "state").exists()


def test_a_revision_is_read_as_it_was_written_and_names_its_parent(tmp_path: Path) -> None:
    """The parent's digest is the SHA-256 of its file, so that sha256sum can check the chain."""
    revisions = chain(tmp_path, 3)

    assert [revision.number for revision in revisions.history()] == [3, 2, 1]
    assert revisions.history(2)[1] == revisions.get(2)
    assert revisions.head().parent_digest == digest_of(file_of(tmp_path, 2).read_bytes())
    assert revisions.get(1).parent_digest == ""
    assert revisions.verify() == []
    with pytest.raises(RevisionNotFoundError):
        revisions.get(4)


def test_a_taken_number_is_refused_and_stays_as_it_was(tmp_path: Path) -> None:
    """Create if absent is the compare-and-swap."""
    first, second = Revisions(tmp_path), Revisions(tmp_path)
    base = first.head()

    assert first.append(after(base, fraud=1))
    assert not second.append(after(base, fraud=2))
    assert champion(second.head()) == 1


@pytest.mark.parametrize(
    "said", [b"", b"1\n", b"2 sha256:00\n", b"999\n", b"-3\n", b"\xff\x00", None]
)
def test_head_is_found_whatever_the_file_HEAD_says(  # noqa: N802  the name of the file
    tmp_path: Path, said: bytes | None
) -> None:
    """It lags, lies, is torn or is missing: it only costs looks."""
    chain(tmp_path, 4)
    if said is None:
        (tmp_path / "HEAD").unlink()
    else:
        (tmp_path / "HEAD").write_bytes(said)

    revisions = Revisions(tmp_path)

    assert champion(revisions.head()) == 4
    assert revisions.problems == ()


def test_an_unchanged_head_costs_one_attempt_to_open_a_file(tmp_path: Path) -> None:
    """Every worker asks twice a second or more, of a network share too."""
    revisions = chain(tmp_path, 3)
    revisions.head()
    n = 2000

    start = time.perf_counter()
    for _ in range(n):
        revisions.head()
    each_s = (time.perf_counter() - start) / n

    assert each_s < 200e-6, f"{each_s * 1e6:.1f} us"
    Revisions(tmp_path).append(after(revisions.head(), fraud=9))
    assert champion(revisions.head()) == 9


def test_what_was_seen_stays_in_force_when_the_directory_goes(tmp_path: Path) -> None:
    """Fail static: a registry that is gone takes nothing away."""
    revisions = chain(tmp_path / "state", 2)
    revisions.head()
    (tmp_path / "state").rename(tmp_path / "elsewhere")

    assert champion(revisions.head()) == 2


def torn(data: bytes) -> bytes:
    return data[: len(data) // 2]


def tampered(data: bytes) -> bytes:
    return data.replace(b'"champion": 3', b'"champion": 1')


def unknown_field(data: bytes) -> bytes:
    return data.replace(b'"aliases"', b'"aliasses"')


def other_number(data: bytes) -> bytes:
    return data.replace(b'"revision": 3', b'"revision": 4')


def foreign(data: bytes) -> bytes:
    """A whole revision of another registry."""
    revision = msgspec.structs.replace(read(data, 3), parent_digest="sha256:" + "0" * 64)
    return revision.to_json()


@pytest.mark.parametrize("damage", [torn, unknown_field, other_number, foreign, lambda _: b""])
@pytest.mark.parametrize("has_head", [True, False])
def test_a_damaged_newest_revision_is_set_aside_and_the_last_good_one_counts(
    tmp_path: Path, damage: Callable[[bytes], bytes], *, has_head: bool
) -> None:
    """It is reported; the next writer takes the number behind it and goes on from the good one."""
    chain(tmp_path, 3)
    file = file_of(tmp_path, 3)
    file.chmod(0o644)
    file.write_bytes(damage(file.read_bytes()))
    if not has_head:
        (tmp_path / "HEAD").unlink()

    revisions = Revisions(tmp_path)

    assert champion(revisions.head()) == 2
    assert len(revisions.problems) == 1
    assert revisions.problems[0].startswith("revision 3: ")
    assert revisions.verify() == list(revisions.problems)
    assert revisions.free_number == 4
    head = revisions.head()
    assert revisions.append(msgspec.structs.replace(after(head, fraud=7), number=4))
    assert champion(revisions.head()) == champion(Revisions(tmp_path).head()) == 7
    assert [revision.number for revision in Revisions(tmp_path).history()] == [4, 2, 1]
    assert revisions.problems == ()


def test_a_file_that_is_still_being_copied_counts_once_it_is_whole(tmp_path: Path) -> None:
    """A replica by rsync or kubectl cp may be seen half-way."""
    chain(tmp_path, 3)
    file = file_of(tmp_path, 3)
    whole = file.read_bytes()
    file.unlink()
    file.write_bytes(torn(whole))
    revisions = Revisions(tmp_path)
    assert champion(revisions.head()) == 2

    file.write_bytes(whole)

    assert champion(revisions.head()) == 3
    assert revisions.problems == ()


@pytest.mark.parametrize("number", [1, 2, 3])
def test_a_changed_byte_anywhere_in_the_past_is_noticed(tmp_path: Path, number: int) -> None:
    """History cannot be rewritten quietly, and rewriting it does not change what is in force."""
    chain(tmp_path, 4)
    file = file_of(tmp_path, number)
    changed = read(file.read_bytes(), number)
    file.unlink()
    file.write_bytes(msgspec.structs.replace(changed, actor="nobody").to_json())

    revisions = Revisions(tmp_path)

    assert champion(revisions.head()) == 4
    assert any(f"revision {number}: was changed" in problem for problem in revisions.verify())


def test_history_goes_on_behind_a_revision_that_is_torn(tmp_path: Path) -> None:
    """One bad sector does not hide what was before it."""
    chain(tmp_path, 4)
    file = file_of(tmp_path, 2)
    whole = file.read_bytes()
    file.unlink()
    file.write_bytes(torn(whole))

    revisions = Revisions(tmp_path)

    assert [revision.number for revision in revisions.history()] == [4, 3, 1]
    assert revisions.verify()[0].startswith("revision 2: ")


def test_a_revision_of_a_later_release_is_neither_read_nor_passed_over(tmp_path: Path) -> None:
    """An older release must not write on from a state that it has not understood."""
    revisions = chain(tmp_path, 2)
    newer = json.loads(after(revisions.head(), fraud=3).to_json()) | {"format": 2, "new": []}
    file_of(tmp_path, 3).write_text(json.dumps(newer))

    for reader in (revisions, Revisions(tmp_path)):
        for _ in range(2):
            with pytest.raises(NewerFormatError, match="upgrade"):
                reader.head()


def test_a_directory_that_cannot_be_read_is_said_and_is_no_empty_registry(tmp_path: Path) -> None:
    """Revision 0 would hand all traffic to the highest versions."""
    revisions = chain(tmp_path, 2)
    revisions.head()
    file_of(tmp_path, 3).mkdir()

    with pytest.raises(RevisionError, match="cannot be read"):
        revisions.head()


def test_unknown_fields_are_refused_with_the_one_that_was_meant() -> None:
    """A field that is passed over silently is a setting that somebody believes in."""
    data = unknown_field(after(EMPTY, fraud=1).to_json())

    with pytest.raises(RevisionError, match="did you mean 'aliases'"):
        read(data, 1)


@given(st.data())
@settings(max_examples=200, deadline=None)
def test_whatever_bytes_a_file_holds_it_is_a_revision_or_a_sentence(data: st.DataObject) -> None:
    """A changed, cut or added byte is refused or another whole revision; nothing else happens."""
    whole = after(EMPTY, fraud=1).to_json()
    at = data.draw(st.integers(0, len(whole)))
    end = data.draw(st.integers(at, len(whole)))
    changed = whole[:at] + data.draw(st.binary(max_size=8)) + whole[end:]

    try:
        found = read(changed, 1)
    except RevisionError as error:
        assert str(error).startswith("revision 1: ")  # noqa: PT017  either is right
    else:
        assert found.to_json() == changed


RACER = """
import sys, time
from pathlib import Path
from registry.revisions import Revisions
from tests.registry.test_revisions import after

directory, me, n = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
revisions = Revisions(directory)
print("ready", flush=True)
sys.stdin.readline()
done = 0
while done < n:
    if revisions.append(after(revisions.head(), **{me: done + 1})):
        done += 1
"""


def python(source: str, *words: str) -> "subprocess.Popen[str]":
    root = Path(__file__).parents[2]
    return subprocess.Popen(
        [sys.executable, "-c", source, *words],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=root,
        env={**os.environ, "PYTHONPATH": str(root)},
    )


@pytest.mark.parametrize("n_writers", [2, 8])
def test_of_racing_writers_every_number_is_taken_once_and_no_change_is_lost(
    tmp_path: Path, n_writers: int
) -> None:
    """Each process appends its own changes as fast as it can; at the end all of them are there."""
    n = 48 // n_writers
    writers = [python(RACER, str(tmp_path), f"model-{k}", str(n)) for k in range(n_writers)]
    for writer in writers:
        assert writer.stdout is not None
        assert writer.stdout.readline() == "ready\n"
    for writer in writers:
        assert writer.stdin is not None
        writer.stdin.write("go\n")
        writer.stdin.flush()
    for writer in writers:
        writer.communicate(timeout=60)
        assert writer.returncode == 0

    revisions = Revisions(tmp_path)
    history = revisions.history()

    assert [revision.number for revision in history] == list(range(48, 0, -1))
    assert revisions.verify() == []
    assert {name: state.aliases["champion"] for name, state in history[0].models.items()} == {
        f"model-{k}": n for k in range(n_writers)
    }
    assert sorted(revision.message for revision in history) == sorted(
        str({f"model-{k}": i + 1}) for k in range(n_writers) for i in range(n)
    )


KILLED = """
import os, signal, sys
from pathlib import Path
from registry import store
from registry.revisions import Revisions
from tests.registry.test_revisions import after

directory, at = Path(sys.argv[1]), int(sys.argv[2])
revisions = Revisions(directory)
head = revisions.head()
taken = []

def step(name):
    taken.append(name)
    if len(taken) == at:
        os.kill(os.getpid(), signal.SIGKILL)

store.steps = step
revisions.append(after(head, fraud=2))
print(len(taken))
"""


def test_a_writer_killed_at_any_step_leaves_the_old_or_the_new_revision(tmp_path: Path) -> None:
    """kill -9 before the n-th step, for every n; then the next writer goes on."""
    n_steps = 0
    for at in range(1, 100):
        directory = tmp_path / str(at)
        chain(directory, 1)
        writer = python(KILLED, str(directory), str(at))
        printed, _ = writer.communicate(timeout=30)
        if writer.returncode == 0:
            n_steps = int(printed)
            break
        assert writer.returncode == -signal.SIGKILL
        revisions = Revisions(directory)
        assert champion(revisions.head()) in (1, 2)
        assert revisions.verify() == []
        assert revisions.append(after(revisions.head(), fraud=3))
        assert champion(Revisions(directory).head()) == 3
        left = [entry.name for entry in (directory / "revisions").iterdir()]
        assert all(name.endswith(".json") for name in left), left
    assert n_steps >= 8


def test_a_full_or_read_only_disk_changes_nothing_and_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every call that may fail fails once: the change is there whole or not at all."""
    revisions = chain(tmp_path, 1)
    steps: list[str] = []
    monkeypatch.setattr(store, "steps", steps.append)
    assert revisions.append(after(revisions.head(), fraud=2))
    for n in range(len(steps)):
        head = revisions.head()
        left = [n]

        def fail(_: str, left: list[int] = left) -> None:
            left[0] -= 1
            if left[0] == -1:
                raise OSError(28, "injected")

        monkeypatch.setattr(store, "steps", fail)
        was_written = True
        try:
            assert revisions.append(after(head, fraud=100 + n))
        except WriteError:
            was_written = False
        now = Revisions(tmp_path).head()
        assert champion(now) == 100 + n if was_written else now == head
        monkeypatch.setattr(store, "steps", lambda _: None)
    assert Revisions(tmp_path).verify() == []
