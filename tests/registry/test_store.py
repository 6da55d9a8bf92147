"""What is written is there whole or not at all, whatever call fails and whenever a writer dies."""

import errno
import hashlib
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from registry import store
from registry.errors import UnsafeFileError, WriteError
from registry.store import Lease, Staging

LARGE = 1 << 40


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the steps taken."""
    taken: list[str] = []
    monkeypatch.setattr(store, "steps", taken.append)
    return taken


def left_over(directory: Path) -> list[str]:
    return sorted(entry.name for entry in directory.iterdir() if entry.name.startswith("."))


def test_of_many_writers_of_a_name_exactly_one_makes_it(tmp_path: Path) -> None:
    """link(2) decides; the bytes are those of the one who was told True."""
    made: list[bytes] = []
    start = threading.Barrier(8)

    def write(data: bytes) -> None:
        start.wait()
        if store.create_if_absent(tmp_path / "1.json", data):
            made.append(data)

    threads = [threading.Thread(target=write, args=(b"%d" % k * 100,)) for k in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert len(made) == 1
    assert (tmp_path / "1.json").read_bytes() == made[0]
    assert left_over(tmp_path) == []


def test_without_links_a_lock_decides(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """FAT and some network file systems have no link(2)."""

    def refuse(*_: object) -> None:
        raise OSError(errno.EPERM, "no links here")

    monkeypatch.setattr(os, "link", refuse)

    assert store.create_if_absent(tmp_path / "a", b"first")
    assert not store.create_if_absent(tmp_path / "a", b"second")
    assert (tmp_path / "a").read_bytes() == b"first"


def test_a_link_whose_answer_was_lost_counts_as_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Over NFS a repeated request can meet its own first success as 'exists'."""
    link = os.link

    def lossy(source: Path, target: Path) -> None:
        link(source, target)
        raise FileExistsError(errno.EEXIST, "exists")

    monkeypatch.setattr(os, "link", lossy)

    assert store.create_if_absent(tmp_path / "a", b"mine")


@pytest.mark.parametrize("write", [store.create_if_absent, store.replace])
@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO, errno.EROFS])
def test_when_any_call_fails_the_file_is_old_or_new(
    tmp_path: Path,
    write: Callable[[Path, bytes], object],
    code: int,
    steps: list[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The n-th call fails, for every n; then nothing is torn and nothing is left."""
    write(tmp_path / "trial", b"new")
    for n, name in enumerate(list(steps)):
        target = tmp_path / f"{n}"
        if write is store.replace:
            target.write_bytes(b"old")

        def fail(_: str, left: list[int] = [n]) -> None:  # noqa: B006  a counter
            left[0] -= 1
            if left[0] == -1:
                raise OSError(code, "injected")

        monkeypatch.setattr(store, "steps", fail)
        if name == "remove temporary":
            write(target, b"new")
        else:
            with pytest.raises(WriteError) as caught:
                write(target, b"new")
            assert caught.value.errno == code
            assert caught.value.is_full == (code == errno.ENOSPC)
            assert str(tmp_path) not in str(caught.value)
        monkeypatch.setattr(store, "steps", lambda _: None)
        old = [b"old"] if write is store.replace else []
        assert not target.exists() or target.read_bytes() in {*old, b"new"}
        assert target.exists() or write is store.create_if_absent
        store.sweep(tmp_path)
        assert left_over(tmp_path) == []


def test_short_writes_are_continued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """write(2) may take one byte of many."""
    write = os.write
    monkeypatch.setattr(os, "write", lambda fd, data: write(fd, data[:1]))

    store.replace(tmp_path / "a", b"all of it")

    assert (tmp_path / "a").read_bytes() == b"all of it"


KILLED = """
import os, signal, sys
from pathlib import Path
from registry import store
left = int(sys.argv[2])
def step(name):
    global left
    left -= 1
    if left < 0:
        os.kill(os.getpid(), signal.SIGKILL)
store.steps = step
root = Path(sys.argv[1])
if sys.argv[3] == "create":
    store.create_if_absent(root / "a", b"new" * 1000)
else:
    with store.Staging(root) as staging:
        staging.write("model.onnx", b"new" * 1000)
        staging.publish(root / "1")
"""


@pytest.mark.parametrize("what", ["create", "publish"])
def test_killed_at_any_step_it_is_all_there_or_not(tmp_path: Path, what: str) -> None:
    """SIGKILL before each step in turn; the next writer removes what was left."""
    n_kills = 0
    for n in range(100):
        root = tmp_path / f"{n}"
        root.mkdir()
        done = subprocess.run(
            [sys.executable, "-c", KILLED, str(root), str(n), what], check=False, timeout=60
        )
        found = root / "a" if what == "create" else root / "1" / "model.onnx"
        assert not found.exists() or found.read_bytes() == b"new" * 1000
        visible = [entry.name for entry in root.iterdir() if not entry.name.startswith(".")]
        assert visible in ([], ["a"], ["1"])
        store.sweep(root)
        store.sweep(root / store.STAGING)
        assert [path for path in root.rglob("*") if path.name.endswith(("tmp", "lock"))] == []
        if done.returncode == 0:
            break
        assert done.returncode == -signal.SIGKILL
        n_kills += 1
    assert n_kills >= 5


def test_what_a_living_writer_has_is_not_swept(tmp_path: Path) -> None:
    """Whoever sweeps asks the lock, not the clock."""
    with Staging(tmp_path) as staging:
        staging.write("model.onnx", b"x")
        assert store.sweep(tmp_path / store.STAGING) == 0
        assert staging.publish(tmp_path / "1")

    assert (tmp_path / "1" / "model.onnx").read_bytes() == b"x"
    assert list((tmp_path / store.STAGING).iterdir()) == []


def test_two_publishers_of_a_number_one_is_told(tmp_path: Path) -> None:
    """A directory is not renamed onto one that holds something."""
    with Staging(tmp_path) as first, Staging(tmp_path) as second:
        first.write("model.onnx", b"first")
        second.write("model.onnx", b"second")
        assert first.publish(tmp_path / "7")
        assert not second.publish(tmp_path / "7")
        assert second.publish(tmp_path / "8")

    assert (tmp_path / "7" / "model.onnx").read_bytes() == b"first"
    assert (tmp_path / "8" / "model.onnx").read_bytes() == b"second"


def test_a_lease_is_held_by_one_and_ends_with_its_holder(tmp_path: Path) -> None:
    """Also when the holder is killed."""
    path = tmp_path / "lease"
    code = (
        "import sys, time; from pathlib import Path; from registry.store import Lease;"
        "lease = Lease(Path(sys.argv[1])); print(lease.acquire(), flush=True); time.sleep(60)"
    )
    holder = subprocess.Popen([sys.executable, "-c", code, str(path)], stdout=subprocess.PIPE)
    assert holder.stdout is not None
    assert holder.stdout.readline() == b"True\n"
    lease = Lease(path)
    assert not lease.acquire()
    holder.kill()
    holder.wait()
    holder.stdout.close()

    assert lease.acquire()
    assert not Lease(path).acquire()
    lease.release(remove=True)
    assert not path.exists()


@pytest.mark.parametrize("is_durable", [True, False])
def test_a_private_copy_holds_what_was_hashed(
    tmp_path: Path, steps: list[str], *, is_durable: bool
) -> None:
    """Digest and size are those of the copy; the disk is waited for only where that is meant."""
    source, target = tmp_path / "source", tmp_path / "target"
    source.mkdir()
    target.mkdir()
    data = os.urandom(3_000_000)
    (source / "model.onnx").write_bytes(data)

    found = store.private_copy(
        source, ["model.onnx"], target, bytes_max=LARGE, is_durable=is_durable
    )

    assert ("fsync" in steps) == is_durable
    assert (target / "model.onnx").read_bytes() == data
    assert found["model.onnx"] == store.FileDigest(hashlib.sha256(data).hexdigest(), len(data))
    assert found["model.onnx"] == store.digest_of_file(source / "model.onnx")


def test_links_pipes_and_paths_are_not_copied(tmp_path: Path) -> None:
    """A file from elsewhere is not read as part of a version, by whatever kind of link."""
    source, target = tmp_path / "source", tmp_path / "target"
    source.mkdir()
    target.mkdir()
    (tmp_path / "secret").write_bytes(b"secret")
    os.link(tmp_path / "secret", source / "hard")
    (source / "soft").symlink_to(tmp_path / "secret")
    (source / "inner").symlink_to("plain")
    (source / "plain").write_bytes(b"four")
    (source / "folder").mkdir()
    os.mkfifo(source / "pipe")

    for name, reason in {
        "hard": "hard link",
        "soft": "symbolic link",
        "inner": "symbolic link",
        "folder": "not a regular file",
        "pipe": "not a regular file",
        "../secret": "in the directory itself",
        str(tmp_path / "secret"): "in the directory itself",
        "..": "in the directory itself",
    }.items():
        with pytest.raises(UnsafeFileError, match=reason):
            store.private_copy(source, [name], target, bytes_max=LARGE)
    with pytest.raises(UnsafeFileError, match="3 are allowed"):
        store.private_copy(source, ["plain"], target, bytes_max=3)
    assert b"secret" not in [path.read_bytes() for path in target.iterdir()]
