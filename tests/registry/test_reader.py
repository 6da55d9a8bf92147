"""What is copied in by hand is let in when it is still, and what was let in must stay as it is."""

import os
from pathlib import Path
from typing import Any

import pytest

from registry import catalog, manifest, store
from registry.catalog import Catalog, Reader
from registry.errors import RegistryError, UnsafeFileError
from registry.manifest import Manifest, SignatureEntry

SETTLE_S = 2.0


class Clock:
    """A clock that goes when it is told to."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


class Look:
    """A reader under such a clock, and a wall clock that makes every file look new."""

    def __init__(self, root: Path) -> None:
        self.clock = Clock()
        self.reader = Reader(root, settle_s=SETTLE_S, clock=self.clock, wall_clock=lambda: 0.0)

    def after(self, seconds: float) -> Catalog:
        self.clock.now += seconds
        return self.reader.look()


def put(root: Path, version: int = 1, data: bytes = b"model", model: str = "fraud") -> Path:
    directory = root / model / str(version)
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "model.onnx").write_bytes(data)
    return directory


def describe(directory: Path, version: int = 1) -> Manifest:
    """Write a manifest for the files that are there."""
    files = catalog.VersionFiles("fraud", version, directory)
    entries = manifest.entries(catalog.digests_of(files))
    made = Manifest(
        model="fraud",
        version=version,
        files=entries,
        digest=manifest.tree_digest(entries),
        signature=SignatureEntry((), ()),
    )
    (directory / manifest.FILE).write_bytes(made.to_json())
    return made


def numbers(found: Catalog) -> list[int]:
    return [files.version for files in found.models.get("fraud", ())]


def test_a_directory_copied_by_hand_is_let_in_when_it_was_still(tmp_path: Path) -> None:
    """On the reader's own clock, each change starting it anew."""
    look = Look(tmp_path)
    put(tmp_path)
    assert numbers(look.after(0)) == []
    assert numbers(look.after(SETTLE_S * 0.9)) == []
    put(tmp_path, data=b"model, longer")
    found = look.after(SETTLE_S * 0.9)
    assert numbers(found) == []
    assert ("fraud", 1) in found.pending
    assert numbers(look.after(SETTLE_S * 0.9)) == []

    assert numbers(look.after(SETTLE_S * 0.2)) == [1]


@pytest.mark.parametrize("pause_s", [0.5, SETTLE_S * 0.9])
def test_a_slow_copy_is_never_let_in_half(tmp_path: Path, pause_s: float) -> None:
    """Byte by byte, each look sees another state; the first admitted one is whole."""
    look, data = Look(tmp_path), os.urandom(40)
    put(tmp_path, data=b"")
    for n in range(1, len(data) + 1):
        with (tmp_path / "fraud" / "1" / "model.onnx").open("ab") as stream:
            stream.write(data[n - 1 : n])
        assert numbers(look.after(pause_s)) == []

    look.after(SETTLE_S)
    assert numbers(look.after(SETTLE_S)) == [1]


def test_a_copy_that_pauses_is_not_let_in_while_it_is_open(tmp_path: Path) -> None:
    """However long it pauses, up to a minute: the system tells who writes."""
    look = Look(tmp_path)
    directory = put(tmp_path, data=b"")
    with (directory / "model.onnx").open("wb") as stream:
        stream.write(b"half")
        stream.flush()
        look.after(0)
        assert numbers(look.after(SETTLE_S * 5)) == []
        stream.write(b" and the rest")
    look.after(0)

    assert numbers(look.after(SETTLE_S)) == [1]


def test_files_that_are_old_at_the_first_look_are_not_waited_for(tmp_path: Path) -> None:
    """A start must not take a settle time longer; but a wrong clock lets nothing in early."""
    directory = put(tmp_path)
    changed = (directory / "model.onnx").stat().st_ctime

    def first(wall: float) -> list[int]:
        return numbers(Reader(tmp_path, wall_clock=lambda: changed + wall).look())

    assert first(60.0) == [1]
    assert first(1.0) == []
    assert first(-86_400.0) == []


def test_a_version_with_a_manifest_is_let_in_when_its_files_are_there(tmp_path: Path) -> None:
    """Publish renames it into place whole: there is nothing to wait for."""
    look = Look(tmp_path)
    made = describe(put(tmp_path))

    found = look.after(0)

    assert numbers(found) == [1]
    assert found.models["fraud"][0].digest == made.digest


@pytest.mark.parametrize(
    ("files", "reason"),
    [
        ({"model.onnx": b"half"}, "holds 4 bytes; its manifest says 5"),
        ({"model.onnx": None}, "in its manifest, but not in its directory"),
        ({"stray.bin": b"x"}, "in its directory, but not in its manifest"),
        ({"manifest.json": b"{"}, "manifest.json: "),
    ],
)
def test_a_manifest_that_does_not_fit_its_files_waits_then_is_a_problem(
    tmp_path: Path, files: dict[str, bytes | None], reason: str
) -> None:
    """It may be half-way through a copy; when that comes to rest, it is wrong."""
    look, directory = Look(tmp_path), put(tmp_path)
    describe(directory)
    for name, data in files.items():
        if data is None:
            (directory / name).unlink()
        else:
            (directory / name).write_bytes(data)

    first = look.after(0)
    assert (numbers(first), first.problems) == ([], ())
    later = look.after(SETTLE_S)
    assert numbers(later) == []
    assert reason in later.problems[0]
    put(tmp_path)
    (directory / "stray.bin").unlink(missing_ok=True)
    describe(directory)

    assert numbers(look.after(0.1)) == [1]


def test_changed_bytes_under_an_admitted_number_are_reported(tmp_path: Path) -> None:
    """They are not let in under it; put back, all is well."""
    look, directory = Look(tmp_path), put(tmp_path)
    look.after(0)
    files = look.after(SETTLE_S).models["fraud"][0]
    look.reader.admit(files, catalog.digest_of(files))

    put(tmp_path, data=b"MODEL")
    found = look.after(0.5)
    assert found.changed == {("fraud", 1)}
    assert "changed after it was admitted" in found.problems[0]
    assert found.models["fraud"] == (files,)

    put(tmp_path, data=b"model")
    found = look.after(0.5)
    assert found.changed == frozenset()
    assert found.problems == ()
    assert directory.is_dir()


def test_a_touch_is_no_change(tmp_path: Path) -> None:
    """Times are hints: only the bytes tell."""
    look, directory = Look(tmp_path), put(tmp_path)
    describe(directory)
    look.after(0)
    os.utime(directory / "model.onnx", (0, 4_000_000_000))

    found = look.after(0.5)

    assert (numbers(found), found.changed, found.problems) == ([1], frozenset(), ())


def test_two_changes_within_one_tick_of_the_clock_are_both_seen(tmp_path: Path) -> None:
    """A directory's time stamp is too coarse to tell them apart; it is set back here."""
    look = Look(tmp_path)
    describe(put(tmp_path, 1))
    look.after(0)
    before = (tmp_path / "fraud").stat()
    describe(put(tmp_path, 2), 2)
    os.utime(tmp_path / "fraud", ns=(before.st_atime_ns, before.st_mtime_ns))

    assert numbers(look.after(0.5)) == [1, 2]


def test_a_withdrawn_version_is_not_among_the_models(tmp_path: Path) -> None:
    """From the next look on."""
    look = Look(tmp_path)
    describe(put(tmp_path, 1))
    describe(put(tmp_path, 2), 2)
    assert numbers(look.after(0)) == [1, 2]
    look.after(60)
    store.create_if_absent(tmp_path / "fraud" / f"{catalog.WITHDRAWN}2", b"{}")

    found = look.after(0.5)

    assert numbers(found) == [1]
    assert found.withdrawn == {("fraud", 2)}


def test_a_registry_that_is_gone_is_an_error_and_what_was_seen_is_kept(tmp_path: Path) -> None:
    """It comes back with what it had; a version removed is gone."""
    root = tmp_path / "models"
    look = Look(root)
    describe(put(root, 1))
    describe(put(root, 2), 2)
    look.after(0)
    root.rename(tmp_path / "elsewhere")
    with pytest.raises(RegistryError, match="no such directory"):
        look.after(1)
    (tmp_path / "elsewhere").rename(root)
    (root / "fraud" / "2").rename(tmp_path / "removed")

    assert numbers(look.after(1)) == [1]


def test_every_file_is_looked_at_in_its_turn(tmp_path: Path) -> None:
    """A rewrite in place changes no directory; a slice of the files is looked at each time."""
    for k in range(40):
        directory = tmp_path / f"m{k}" / "1"
        directory.mkdir(parents=True)
        (directory / "model.onnx").write_bytes(b"model")
    look = Look(tmp_path)
    look.after(0)
    found = look.after(SETTLE_S)
    assert len(found.models) == 40
    for (files,) in found.models.values():
        look.reader.admit(files, catalog.digest_of(files))
    look.after(SETTLE_S * 2)
    (tmp_path / "m27" / "1" / "model.onnx").write_bytes(b"MODEL")

    seen = [look.after(SETTLE_S * 2).changed for _ in range(3)]

    assert seen[-1] == {("m27", 1)}


def test_a_thousand_models_cost_a_stat_each(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """When nothing changes: one listing, a stat a model, and a slice of the files."""
    for k in range(1000):
        (tmp_path / f"m{k}" / "1").mkdir(parents=True)
        (tmp_path / f"m{k}" / "1" / "model.onnx").touch()
    look = Look(tmp_path)
    look.after(0)
    assert len(look.after(SETTLE_S).models) == 1000
    look.after(SETTLE_S * 2)
    calls = {"scandir": 0, "stat": 0}

    def counted(name: str) -> None:
        original = getattr(os, name)

        def call(*arguments: object, **options: object) -> object:
            calls[name] += 1
            return original(*arguments, **options)

        monkeypatch.setattr(os, name, call)

    counted("scandir")
    counted("stat")

    assert len(look.after(1).models) == 1000
    assert calls["scandir"] <= 50
    assert calls["stat"] <= 1100


def test_a_hundred_versions_of_a_model_are_looked_at_a_slice_at_a_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A look costs no more for all the versions there are, and none is left out for ever."""
    for name, number in [("few", 1), *(("many", n) for n in range(1, 101)), ("more", 1)]:
        put(tmp_path, number, model=name)
    look = Look(tmp_path)
    look.after(0)
    found = look.after(SETTLE_S)
    for model in found.models.values():
        for files in model:
            look.reader.admit(files, catalog.digest_of(files))
    look.after(SETTLE_S * 2)
    n_scans = 0
    scan = os.scandir

    def counted(*arguments: Any) -> Any:
        nonlocal n_scans
        n_scans += 1
        return scan(*arguments)

    monkeypatch.setattr(os, "scandir", counted)
    for _ in range(10):
        n_scans = 0
        look.after(SETTLE_S * 2)
        assert n_scans <= 20

    for name, number in (("many", 3), ("many", 98), ("more", 1), ("few", 1)):
        (tmp_path / name / str(number) / "model.onnx").write_bytes(b"MODEL")
    changed: set[tuple[str, int]] = set()
    for _ in range(102 // 16 + 1):
        changed |= look.after(SETTLE_S * 2).changed
    assert changed == {("many", 3), ("many", 98), ("more", 1), ("few", 1)}


def test_a_linked_file_has_no_digest(tmp_path: Path) -> None:
    """Of neither kind of link."""
    for make in (os.link, os.symlink):
        root = tmp_path / make.__name__
        directory = put(root)
        (tmp_path / "secret").write_bytes(b"secret")
        make(tmp_path / "secret", directory / "model.onnx.data")
        with pytest.raises(UnsafeFileError, match="link"):
            catalog.digest_of(catalog.VersionFiles("fraud", 1, directory))
