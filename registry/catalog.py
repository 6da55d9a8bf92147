"""Models and versions of a registry directory: what is there, and what is not as it must be.

`scan` looks once. A `Reader` looks again and again, cheaply, and lets in what was copied by hand
only when nobody seems to write to it any more. Neither opens a model: whether it is one is found
out by the gateway.
"""

import fcntl
import os
import signal
import stat
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from registry import manifest, names, store
from registry.errors import ManifestError, RegistryError, UnsafeFileError
from registry.manifest import Manifest
from registry.store import FileDigest

MODEL_FILE = "model.onnx"
REFERENCE_FILE = "reference.json"
LABELS_FILE = "labels.json"
WARMUP_FILE = "warmup.jsonl"
GOLDEN_FILE = "golden.jsonl"
WITHDRAWN = ".withdrawn-"
"""In a model's directory: `.withdrawn-7` says that version 7 must not be served again."""

_NOT_CONTENT = (manifest.FILE, manifest.SEAL_FILE)
_SLICE = 16
"""Versions whose files are looked at in one look, besides those that are new."""
_WRITER_S_MAX = 60.0
"""Files that were still for so long are admitted though somebody seems to have them open: some
network file systems say so of every file."""
_RACY_S = 2.0
"""A directory that changed less than this ago is listed again: its time stamp is too coarse to
tell two changes apart."""


@dataclass(frozen=True, slots=True)
class VersionFiles:
    """Where the files of one version are."""

    model: str
    version: int
    directory: Path
    manifest: Manifest | None = None
    """What publish wrote; None for a directory that was copied in without one."""
    fingerprint: str = field(default="", repr=False)
    """Sizes, times and numbers of the files: another one means that the bytes may be others."""

    @property
    def model_file(self) -> Path:
        """The ONNX file."""
        return self.directory / MODEL_FILE

    @property
    def reference_file(self) -> Path:
        """The reference profile; it need not exist."""
        return self.directory / REFERENCE_FILE

    @property
    def labels_file(self) -> Path:
        """The reference of labels; it need not exist."""
        return self.directory / LABELS_FILE

    @property
    def digest(self) -> str | None:
        """The digest that the manifest states; None where there is none."""
        return None if self.manifest is None else self.manifest.digest


@dataclass(frozen=True, slots=True)
class Catalog:
    """One look at the directory."""

    models: Mapping[str, tuple[VersionFiles, ...]]
    """By name; versions ascending by number (10 comes after 9), never empty."""
    problems: tuple[str, ...]
    """What was passed over, and why. Names only, no paths."""
    pending: Mapping[tuple[str, int], str] = field(default_factory=dict)
    """Versions that are not in `models` yet, and what they wait for."""
    changed: frozenset[tuple[str, int]] = frozenset()
    """Versions in `models` whose bytes are no longer those that were admitted."""
    withdrawn: frozenset[tuple[str, int]] = frozenset()
    """Versions that are there, and must not be served; not in `models`."""

    def find(self, model: str, version: int) -> VersionFiles | None:
        """The files of one version."""
        for files in self.models.get(model, ()):
            if files.version == version:
                return files
        return None


def scan(root: Path) -> Catalog:
    """Look through `<model>/<version>/model.onnx`; what does not fit is a problem, not an end.

    Entries that start with a dot are nobody's business (`.git`, `.driftgate`, an editor's files),
    and neither are plain files beside the models. What is being copied in at this moment counts as
    there: a `Reader` would wait.

    Raises
    ------
    RegistryError : `root` is not a directory that can be read.
    """
    return Reader(root, settle_s=0.0).look()


def numbers(model: Path) -> list[int]:
    """Numbers that are taken in a model's directory, whatever is under them.

    Raises
    ------
    RegistryError : it cannot be read.
    """
    try:
        with os.scandir(model) as entries:
            found = (names.version(entry.name) for entry in entries)
            return sorted(number for number in found if number is not None)
    except OSError as error:
        raise RegistryError(f"cannot be read: {error.strerror}") from None


def is_withdrawn(model: Path, version: int) -> bool:
    """Whether a version must not be served again."""
    return (model / f"{WITHDRAWN}{version}").exists()


def content(directory: Path) -> list[str]:
    """Names of the files that make a version: all but its manifest, and what starts with a dot.

    Raises
    ------
    RegistryError : the directory cannot be read, or a file has a name that nothing may have.
    """
    try:
        with os.scandir(directory) as found:
            listed = sorted(
                entry.name
                for entry in found
                if not entry.name.startswith(".")
                and entry.name not in _NOT_CONTENT
                and not entry.is_dir(follow_symlinks=False)
            )
    except OSError as error:
        raise RegistryError(f"cannot be read: {error.strerror}") from None
    if wrong := [name for name in listed if not names.is_file(name)]:
        raise UnsafeFileError(f"{wrong[0]!r} is no name of a file of a version")
    return listed


def digests_of(
    files: VersionFiles, progress: store.Progress = lambda _: None
) -> dict[str, FileDigest]:
    """Hash every file of a version, as it is now.

    Raises
    ------
    RegistryError : a file is a link or cannot be read.
    """
    found: dict[str, FileDigest] = {}
    try:
        folder = os.open(files.directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            for name in content(files.directory):
                found[name] = store.digest_inside(folder, name, progress)
        finally:
            os.close(folder)
    except OSError as error:
        raise RegistryError(f"cannot be read: {error.strerror}") from None
    return found


def digest_of(files: VersionFiles, progress: store.Progress = lambda _: None) -> str:
    """The digest of a version by its bytes, whatever its manifest states.

    Raises
    ------
    RegistryError : a file is a link or cannot be read.
    """
    return manifest.tree_digest(digests_of(files, progress))


def read_manifest(model: str, version: int, directory: Path) -> Manifest | None:
    """The manifest of a version, None where there is none.

    Raises
    ------
    ManifestError : it cannot be believed.
    RegistryError : it cannot be read.
    """
    try:
        folder = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError as error:
        raise RegistryError(f"cannot be read: {error.strerror}") from None
    try:
        data = store.read_inside(folder, manifest.FILE, bytes_max=manifest.BYTES_MAX)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise RegistryError(f"manifest.json cannot be read: {error.strerror}") from None
    finally:
        os.close(folder)
    return manifest.read(data, model=model, version=version)


@dataclass(slots=True)
class _Seen:
    """What a reader remembers of one version directory."""

    fingerprint: str = ""
    still_since: float = 0.0
    is_admitted: bool = False
    files: VersionFiles | None = None
    digest: str | None = None
    """Of the bytes that were admitted, as far as known."""
    problem: str = ""
    is_changed: bool = False


@dataclass(slots=True)
class _Model:
    """What a reader remembers of one model directory, and what it last made of it."""

    name: str
    stamp: tuple[int, ...] = ()
    changed_at: float = 0.0
    seen: dict[int, _Seen] = field(default_factory=dict)
    versions: tuple[VersionFiles, ...] = ()
    problems: tuple[str, ...] = ()
    pending: tuple[int, ...] = ()
    changed: tuple[int, ...] = ()
    withdrawn: frozenset[int] = frozenset()

    @property
    def made(self) -> tuple[object, ...]:
        """What was made of it: equal when nothing has changed."""
        return (self.versions, self.problems, self.pending, self.changed, self.withdrawn)


class Reader:
    """Looks at a registry directory as often as wanted.

    A look at a registry in which nothing changes costs one listing and a stat for each model, and
    a slice of the files. A version that has a manifest is admitted when every file it lists has
    its size: publish renames it into place whole, and whoever copies it by hand comes to that
    point last. A version without one is admitted when its files were still for `settle_s`, seen on
    this process's own clock, and nobody has them open for writing as far as the system tells.
    Time stamps of files are compared for being equal and nothing else, but for one: files that are
    older than `settle_s` when the reader first looks need not be waited for.
    """

    def __init__(
        self,
        root: Path,
        *,
        settle_s: float = 2.0,
        clock: Callable[[], float] = time.monotonic,
        wall_clock: Callable[[], float] = time.time,
    ) -> None:
        self._root = root
        self._settle_s = settle_s
        self._clock = clock
        self._wall_clock = wall_clock
        self._place = str(root)
        self._models: dict[str, _Model] = {}
        self._strays: list[str] = []
        self._last = Catalog({}, ())
        self._stamp: tuple[int, ...] = ()
        self._changed_at = 0.0
        self._present: list[str] = []
        self._known_of: list[str] | None = None
        """The list that `_models` and `_strays` were made for."""
        self._looks = 0
        self._turn = (0, 0)
        """Which model's files are looked at next, from which of its versions on."""
        self._is_first = True

    def look(self) -> Catalog:
        """What is there now; the same object as before when nothing has changed.

        Raises
        ------
        RegistryError : the directory cannot be read; what was seen before is remembered.
        """
        now = self._clock()
        present = self._list(now)
        known, strays = self._models, self._strays
        if present is not self._known_of:
            known, strays = self._knowing(present, now)
        is_same = strays == self._strays and known.keys() == self._models.keys()
        in_turn = self._in_turn(present, known)
        for name in self._due(known, now) | (in_turn.keys() & known.keys()):
            model = known[name]
            before = model.made
            self._review(model, now, in_turn.get(name, set()))
            is_same = is_same and model.made == before
        # Thousands of models that are as they were are not put together again.
        if not is_same:
            self._last = _catalog(known, strays)
        self._models, self._strays, self._is_first = known, strays, False
        self._known_of = present
        return self._last

    def admit(self, files: VersionFiles, digest: str) -> None:
        """Say that this version was opened and holds these bytes: from now on it must keep them."""
        model = self._models.get(files.model)
        seen = None if model is None else model.seen.get(files.version)
        if seen is not None and seen.fingerprint == files.fingerprint:
            seen.digest = digest

    def _list(self, now: float) -> list[str]:
        """Names of the models' directories; listed again when the root says that it changed."""
        try:
            stamp = _stamp(self._root.stat())
        except OSError:
            stamp = ()
        if stamp != self._stamp or not stamp:
            self._stamp, self._changed_at = stamp, now
        self._looks += 1
        if now - self._changed_at <= _RACY_S or self._looks % _SLICE == 0 or self._is_first:
            found = _entries(self._root)
            if found != self._present:
                self._present = found
        return self._present

    def _knowing(self, present: list[str], now: float) -> tuple[dict[str, _Model], list[str]]:
        """What is known of each model, and what is no model."""
        known: dict[str, _Model] = {}
        strays: list[str] = []
        for name in present:
            model = self._models.get(name)
            if model is not None or names.is_model(name):
                known[name] = model or _Model(name, changed_at=now)
            else:
                strays.append(
                    f"{name!r}: not a model name (letters, digits, '.', '_', '-'; no '..')"
                )
        return known, strays

    def _in_turn(self, present: list[str], known: Mapping[str, _Model]) -> dict[str, set[int]]:
        """Versions whose files are looked at this time, by model: a slice of them each time."""
        turns: dict[str, set[int]] = {}
        at, after = self._turn
        n_left = _SLICE
        for _ in range(min(len(present), _SLICE)):
            name = present[at % len(present)]
            numbers = sorted(known[name].seen) if name in known else []
            taken = numbers[after : after + n_left]
            turns[name] = set(taken)
            after += len(taken)
            n_left -= max(1, len(taken))
            if after >= len(numbers):
                at, after = at % len(present) + 1, 0
            if n_left <= 0:
                break
        self._turn = (at, after)
        return turns

    def _due(self, known: Mapping[str, _Model], now: float) -> set[str]:
        """Models whose directory has changed, or is not settled yet.

        For thousands at each look: one system call for each, and as little else as can be.
        """
        found: set[str] = set()
        place, stat_of = f"{self._place}/", os.stat
        stamp: tuple[int, ...]
        for name, model in known.items():
            try:
                about = stat_of(place + name)
                stamp = (about.st_dev, about.st_ino, about.st_mtime_ns, about.st_ctime_ns)
            except OSError:
                stamp = ()
            if stamp != model.stamp:
                model.stamp, model.changed_at = stamp, now
                found.add(name)
            elif now - model.changed_at <= _RACY_S or model.pending or not stamp:
                found.add(name)
        return found

    def _review(self, model: _Model, now: float, in_turn: set[int]) -> None:
        """List a model's versions again, and look at the files of those in turn or not admitted."""
        found, model.withdrawn, problems = _versions(self._root / model.name)
        said: list[str] = list(problems)
        versions: list[VersionFiles] = []
        pending: list[int] = []
        model.seen = {number: model.seen.get(number) or _Seen() for number in found}
        for number, seen in sorted(model.seen.items()):
            if number in model.withdrawn:
                continue
            if number in in_turn or not seen.is_admitted:
                self._examine(seen, model.name, number, found[number], now)
            if seen.problem:
                said.append(f"{model.name!r} version {number}: {seen.problem}")
            if seen.is_admitted and seen.files is not None:
                versions.append(seen.files)
            elif not seen.problem:
                pending.append(number)
        model.versions, model.problems, model.pending = tuple(versions), tuple(said), tuple(pending)
        model.changed = tuple(number for number, seen in model.seen.items() if seen.is_changed)

    def _examine(self, seen: _Seen, model: str, version: int, directory: Path, now: float) -> None:
        """Look at the files of one version, and what they hold if they are others now."""
        try:
            fingerprint, newest = _fingerprint(directory)
        except OSError as error:
            if not seen.is_admitted:
                seen.problem = f"cannot be read: {error.strerror}"
            return
        if fingerprint == seen.fingerprint and (seen.is_admitted or seen.problem):
            return
        if seen.is_admitted and seen.digest is not None:
            self._compare(seen, fingerprint)
            return
        if fingerprint != seen.fingerprint:
            is_old = not seen.fingerprint and self._wall_clock() - newest > self._settle_s
            seen.fingerprint = fingerprint
            seen.still_since = now - self._settle_s if is_old and self._is_first else now
            seen.is_admitted, seen.is_changed, seen.problem = False, False, ""
            seen.files = seen.digest = None
        self._decide(seen, VersionFiles(model, version, directory, None, fingerprint), now)

    def _decide(self, seen: _Seen, files: VersionFiles, now: float) -> None:
        """Admit a version, or say what is wrong with it, or wait."""
        is_still = now - seen.still_since >= self._settle_s
        try:
            described = read_manifest(files.model, files.version, files.directory)
            wrong = _misfit(described, files.directory)
        except ManifestError as error:
            seen.problem = str(error) if is_still else ""
            return
        except RegistryError as error:
            # Not the last word: a disk or a share that says no may say yes the next time.
            seen.problem, seen.fingerprint = str(error), ""
            return
        if described is not None and not wrong:
            seen.files, seen.is_admitted = replace(files, manifest=described), True
            seen.digest = described.digest
        elif not is_still or self._is_being_written(seen, files.directory, now):
            return
        elif wrong:
            seen.problem = wrong
        else:
            seen.files, seen.is_admitted = files, True

    def _is_being_written(self, seen: _Seen, directory: Path, now: float) -> bool:
        is_long_still = now - seen.still_since >= _WRITER_S_MAX
        return self._settle_s > 0 and not is_long_still and _is_written(directory)

    def _compare(self, seen: _Seen, fingerprint: str) -> None:
        """An admitted version was touched: only its bytes tell whether it is another."""
        try:
            digest = digest_of(seen.files) if seen.files is not None else None
        except RegistryError as error:
            seen.problem, seen.is_changed = f"its files were changed: {error}", True
        else:
            seen.is_changed = digest != seen.digest
            seen.problem = (
                "its files were changed after it was admitted; what was admitted serves on, and"
                " the new bytes need a number of their own"
                if seen.is_changed
                else ""
            )
        seen.fingerprint = fingerprint


def _catalog(known: Mapping[str, _Model], strays: list[str]) -> Catalog:
    models: dict[str, tuple[VersionFiles, ...]] = {}
    problems = list(strays)
    pending: dict[tuple[str, int], str] = {}
    changed: set[tuple[str, int]] = set()
    gone: set[tuple[str, int]] = set()
    for name, model in known.items():
        if model.versions:
            models[name] = model.versions
        if model.problems:
            problems += model.problems
        for number in model.pending:
            pending[name, number] = "its files are still changing"
        changed.update((name, number) for number in model.changed)
        gone.update((name, number) for number in model.withdrawn)
    return Catalog(models, tuple(problems), pending, frozenset(changed), frozenset(gone))


def _versions(model: Path) -> tuple[dict[int, Path], frozenset[int], list[str]]:
    """Directories of a model by version, versions withdrawn, and what is neither."""
    found: dict[int, Path] = {}
    gone: set[int] = set()
    problems: list[str] = []
    is_empty = True
    try:
        with os.scandir(model) as entries:
            for entry in entries:
                if entry.name.startswith("."):
                    is_empty = False
                    number = names.version(entry.name.removeprefix(WITHDRAWN))
                    if number is not None and entry.name.startswith(WITHDRAWN):
                        gone.add(number)
                elif entry.is_dir():
                    number = names.version(entry.name)
                    if number is not None:
                        found[number] = Path(entry.path)
                    else:
                        problems.append(
                            f"{model.name!r}: {entry.name!r} is not a version (1, 2, 3, ...)"
                        )
    except OSError as error:
        return {}, frozenset(), [f"{model.name!r}: cannot be read: {error.strerror}"]
    if is_empty and not found and not problems:
        problems.append(f"{model.name!r}: holds no version (a directory named by a number)")
    return found, frozenset(gone), sorted(problems)


def _misfit(described: Manifest | None, directory: Path) -> str:
    """What of the files is not as it must be, by name and size; "" if nothing is."""
    if described is None:
        return "" if (directory / MODEL_FILE).is_file() else f"no {MODEL_FILE} in it"
    for name, entry in described.files.items():
        try:
            size = (directory / name).lstat().st_size
        except OSError:
            return f"{name!r} is in its manifest, but not in its directory"
        if size != entry.bytes:
            return f"{name!r} holds {size} bytes; its manifest says {entry.bytes}"
    if MODEL_FILE not in described.files:
        return f"its manifest lists no {MODEL_FILE}"
    if more := [name for name in content(directory) if name not in described.files]:
        return f"{more[0]!r} is in its directory, but not in its manifest"
    return ""


def _fingerprint(directory: Path) -> tuple[str, float]:
    """Sizes, times and numbers of the files, and the newest of the times."""
    lines: list[str] = []
    newest = 0.0
    for entry in _files(directory):
        try:
            about = entry.stat()
        except FileNotFoundError:
            about = entry.stat(follow_symlinks=False)
        lines.append(f"{entry.name}:{about.st_size}:{_stamp(about)}")
        newest = max(newest, about.st_ctime, about.st_mtime)
    return "\n".join(sorted(lines)) or "empty", newest


def _files(directory: Path) -> Iterator["os.DirEntry[str]"]:
    with os.scandir(directory) as found:
        yield from (entry for entry in found if not entry.name.startswith("."))


def _stamp(about: os.stat_result) -> tuple[int, ...]:
    return (about.st_dev, about.st_ino, about.st_mtime_ns, about.st_ctime_ns)


def _is_written(directory: Path) -> bool:
    """Whether some process has a file of the directory open for writing, where that can be asked.

    A copy can pause for longer than any settle time. Linux grants a read lease only on files that
    nobody writes to; it is given back at once.
    """
    for entry in _files(directory):
        try:
            fd = os.open(entry.path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        except OSError:
            continue
        try:
            if stat.S_ISREG(os.fstat(fd).st_mode):
                # Should somebody open it for writing in between, this signal is ignored.
                fcntl.fcntl(fd, fcntl.F_SETSIG, signal.SIGURG)
                fcntl.fcntl(fd, fcntl.F_SETLEASE, fcntl.F_RDLCK)
                fcntl.fcntl(fd, fcntl.F_SETLEASE, fcntl.F_UNLCK)
        except BlockingIOError:
            return True
        except (OSError, AttributeError):
            continue  # not our file, another file system or another system: the clock decides
        finally:
            os.close(fd)
    return False


def _entries(root: Path) -> list[str]:
    """Names of the visible subdirectories of `root`, sorted."""
    try:
        with os.scandir(root) as entries:
            return sorted(
                entry.name for entry in entries if not entry.name.startswith(".") and entry.is_dir()
            )
    except FileNotFoundError:
        raise RegistryError("no such directory") from None
    except NotADirectoryError:
        raise RegistryError("not a directory") from None
    except PermissionError:
        raise RegistryError("not allowed to read it") from None
    except OSError as error:
        raise RegistryError(f"cannot be read: {error.strerror}") from None
