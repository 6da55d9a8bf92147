"""Bytes on disk that are there whole or not at all: create if absent, replace, stage and publish.

Everything that the registry writes goes through here, in one order: a temporary name, the bytes,
fsync, one rename or link, fsync of the directory. A process may die between any two of them: what
is then under a visible name is the old or the new, whole. What it left under a temporary name is
removed by the next writer, as soon as no living process holds its lock.
"""

import contextlib
import errno
import fcntl
import hashlib
import os
import secrets
import shutil
import stat
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

from registry.errors import UnsafeFileError, WriteError

STAGING = ".staging"
"""Beside the versions of a model: directories on their way to a number."""
_TEMPORARY = ".tmp"
_BLOCK_BYTES = 1 << 20
_NO_LINKS = (errno.EPERM, errno.EOPNOTSUPP, errno.ENOTSUP, errno.ENOSYS, errno.EMLINK)
_TAKEN = (errno.EEXIST, errno.ENOTEMPTY, errno.ENOTDIR)

Progress = Callable[[int], None]
"""Is told how many more bytes are done."""


def _pass_by(_: str) -> None:
    pass


steps: Callable[[str], None] = _pass_by
"""Called before every step with its name. Tests set it, to die or to fail at each of them."""


@dataclass(frozen=True, slots=True)
class FileDigest:
    """What one file holds."""

    sha256: str
    """In hexadecimal digits."""
    bytes: int


class Lease:
    """A lock that one process holds at a time, and that its death gives back.

    The lock belongs to the open file (flock), so two leases of one process exclude each other too.
    The file itself stays: only the lock means something. A child made by fork without exec would
    share it; start children by exec.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._fd = -1

    @property
    def is_held(self) -> bool:
        """Whether this lease holds the lock."""
        return self._fd >= 0

    def acquire(self, *, wait: bool = False) -> bool:
        """Take the lock; without `wait` give up at once when another holds it.

        Raises
        ------
        WriteError : the file cannot be made, or the file system knows no locks.
        """
        while not self.is_held:
            with _writing(self.path):
                fd = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
                try:
                    fcntl.flock(fd, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
                    # Whoever held it may have removed the file meanwhile: a lock on nothing.
                    if _is_same(fd, self.path):
                        self._fd = fd
                except BlockingIOError:
                    return False
                finally:
                    if self._fd != fd:
                        os.close(fd)
        return True

    def release(self, *, remove: bool = False) -> None:
        """Give the lock back, and remove its file if nobody needs it again."""
        if self.is_held:
            if remove:
                with contextlib.suppress(OSError):
                    self.path.unlink()
            os.close(self._fd)
            self._fd = -1

    def __enter__(self) -> Self:
        self.acquire(wait=True)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        at: TracebackType | None,
    ) -> None:
        self.release()


def create_if_absent(path: Path, data: bytes) -> bool:
    """Make `path` with these bytes unless it is there; of several writers exactly one gets True.

    The name appears by link(2), which fails if it is taken, also over NFS. A file system without
    links is written under a lock of the directory.

    Raises
    ------
    WriteError : it could not be written. It may be there all the same if only the last fsync
        failed: read it before trying again.
    """
    with _writing(path), _temporary(path, data, is_durable=True) as (temporary, fd):
        try:
            _step("link")
            os.link(temporary, path)
        except FileExistsError:
            # The answer to a link that did happen can be lost on its way from an NFS server.
            is_made = _is_same(fd, path)
        except OSError as error:
            if error.errno not in _NO_LINKS:
                raise
            is_made = _rename_if_absent(temporary, path)
        else:
            is_made = True
        sync_directory(path.parent)
    return is_made


def replace(path: Path, data: bytes, *, is_durable: bool = True, mode: int = 0o644) -> None:
    """Put these bytes under `path`, whatever was there; readers see the old or the new.

    Without `is_durable` nothing waits for the disk: right for what is written again in a second.
    Nobody whom `mode` leaves out can open it at any moment.

    Raises
    ------
    WriteError : it could not be written; unless only the last fsync failed, the old one is there.
    """
    with (
        _writing(path),
        _temporary(path, data, is_durable=is_durable, mode=mode) as (temporary, _),
    ):
        _step("rename")
        temporary.replace(path)
        if is_durable:
            sync_directory(path.parent)


def make_directory(path: Path) -> None:
    """Make a directory and what is missing above it, and see that they outlive a power cut.

    Raises
    ------
    WriteError : it cannot be made.
    """
    with _writing(path):
        missing = []
        while not path.is_dir():
            missing.append(path)
            path = path.parent
        for each in reversed(missing):
            _step("mkdir")
            with contextlib.suppress(FileExistsError):
                each.mkdir()
            sync_directory(each.parent)


def sync_directory(path: Path) -> None:
    """See that the names in a directory are on disk."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        _step("fsync directory")
        os.fsync(fd)
    except OSError as error:
        # Some network file systems have no fsync for directories: their renames are synchronous.
        if error.errno != errno.EINVAL:
            raise
    finally:
        os.close(fd)


class Staging:
    """A directory that nobody looks at, until one rename makes it a version."""

    def __init__(self, parent: Path) -> None:
        """Make it below `parent`, on whose file system the version will be."""
        root = parent / STAGING
        make_directory(root)
        sweep(root)
        token = secrets.token_hex(8)
        self._lease = Lease(root / f"{token}.lock")
        self._lease.acquire(wait=True)
        self.directory = root / token
        try:
            with _writing(self.directory):
                _step("mkdir")
                self.directory.mkdir()
        except WriteError:
            self._lease.release(remove=True)
            raise

    def write(self, name: str, data: bytes) -> FileDigest:
        """Add a small file, or write it anew."""
        path = self.directory / name
        with _writing(path):
            path.unlink(missing_ok=True)
            fd = _create(path)
            try:
                _write(fd, data)
                _sync(fd)
            finally:
                os.close(fd)
        return FileDigest(hashlib.sha256(data).hexdigest(), len(data))

    def copy(
        self, source: Path, name: str, *, bytes_max: int, progress: Progress = lambda _: None
    ) -> FileDigest:
        """Add a copy of a file, which the caller may give by any path he likes.

        Raises
        ------
        UnsafeFileError : the source is no regular file, or larger than `bytes_max`.
        WriteError : the copy could not be written.
        FileNotFoundError, PermissionError : as the source says.
        """
        fd = os.open(source, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        try:
            _check(os.fstat(fd), source.name, bytes_max, links_max=None)
            return _copy(fd, self.directory / name, source.name, bytes_max, progress)
        finally:
            os.close(fd)

    def publish(self, target: Path) -> bool:
        """Give the directory its name, by one rename; False if the name is taken.

        A directory cannot be renamed onto one that holds something, and this one does: so the
        rename is the reservation of the number too.

        Raises
        ------
        WriteError : it could not be written. It may be there all the same if only the last fsync
            failed.
        """
        with _writing(target):
            sync_directory(self.directory)
            _step("rename directory")
            try:
                self.directory.rename(target)
            except OSError as error:
                if error.errno not in _TAKEN:
                    raise
                return False
            sync_directory(target.parent)
        return True

    def close(self) -> None:
        """Remove what was not published."""
        if self._lease.is_held:
            shutil.rmtree(self.directory, ignore_errors=True)
            self._lease.release(remove=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        at: TracebackType | None,
    ) -> None:
        self.close()


def sweep(directory: Path) -> int:
    """Remove what dead writers left under temporary names in `directory`; say how many.

    A living writer holds a lock on its file, however long it takes; no clock is asked.
    """
    n_removed = 0
    try:
        found = sorted(entry.name for entry in os.scandir(directory))
    except OSError:
        return 0
    for name in found:
        path = directory / name
        if name.endswith(".lock") and directory.name == STAGING:
            lease = Lease(path)
            try:
                if lease.acquire():
                    shutil.rmtree(path.with_suffix(""), ignore_errors=True)
                    lease.release(remove=True)
                    n_removed += 1
            except WriteError:
                continue
        elif directory.name == STAGING and f"{name}.lock" not in found:
            # Its lock is made before it and removed after it: without one it is nobody's.
            if not (directory / f"{name}.lock").exists():
                shutil.rmtree(path, ignore_errors=True)
                n_removed += 1
        elif name.startswith(".") and name.endswith(_TEMPORARY):
            n_removed += _remove_if_dead(path)
    return n_removed


def digest_of_file(path: Path, progress: Progress = lambda _: None) -> FileDigest:
    """Hash a file, links or not.

    Raises
    ------
    OSError : it cannot be read.
    """
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        return _digest(fd, progress)
    finally:
        os.close(fd)


def private_copy(
    source: Path,
    names: Iterable[str],
    target: Path,
    *,
    bytes_max: int,
    is_durable: bool = True,
    progress: Progress = lambda _: None,
) -> dict[str, FileDigest]:
    """Copy files of a directory to a place of one's own, and say what the copies hold.

    What is hashed is what is copied, byte for byte, whatever happens to the source meanwhile: the
    caller compares the digests and opens the copies. Each file must be a regular one in the
    directory itself: no link of either kind, so that no file from elsewhere is read as a model.

    Parameters
    ----------
    is_durable : the copies must outlive a loss of power; those that are gone in a moment need not

    Raises
    ------
    UnsafeFileError : a file is not what it must be, with the reason.
    WriteError : a copy could not be written.
    FileNotFoundError, PermissionError, OSError : as the source says.
    """
    copied: dict[str, FileDigest] = {}
    left = bytes_max
    folder = os.open(source, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        for name in names:
            fd = open_inside(folder, name, bytes_max=left)
            try:
                copied[name] = _copy(fd, target / name, name, left, progress, is_durable=is_durable)
            finally:
                os.close(fd)
            left -= copied[name].bytes
    finally:
        os.close(folder)
    return copied


def digest_inside(folder: int, name: str, progress: Progress = lambda _: None) -> FileDigest:
    """Hash a file of an open directory, if it may be trusted to be there (see `open_inside`)."""
    fd = open_inside(folder, name, bytes_max=sys.maxsize)
    try:
        return _digest(fd, progress)
    finally:
        os.close(fd)


def read_inside(folder: int, name: str, *, bytes_max: int) -> bytes:
    """A small file of an open directory, if it may be trusted to be there (see `open_inside`)."""
    fd = open_inside(folder, name, bytes_max=bytes_max)
    with open(fd, "rb") as stream:  # noqa: PTH123  an open file has no path
        return stream.read(bytes_max)


def open_inside(folder: int, name: str, *, bytes_max: int) -> int:
    """Open a file of an open directory for reading, if it is one that may be trusted to be there.

    Raises
    ------
    UnsafeFileError : its name has a path in it, or it is a link, no regular file or too large.
    OSError : as the file system says.
    """
    if name in {"", ".", ".."} or "/" in name or "\0" in name:
        raise UnsafeFileError(f"{name!r}: must be the name of a file in the directory itself")
    # Without O_NONBLOCK a pipe of this name would hold whoever opens it for ever.
    flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    try:
        fd = os.open(name, flags, dir_fd=folder)
    except OSError as error:
        if error.errno in {errno.ELOOP, errno.EMLINK}:
            raise UnsafeFileError(f"{name!r}: is a symbolic link") from None
        if error.errno == errno.ENXIO:
            raise UnsafeFileError(f"{name!r}: is not a regular file") from None
        raise
    try:
        _check(os.fstat(fd), name, bytes_max, links_max=1)
    except BaseException:
        os.close(fd)
        raise
    return fd


def _digest(fd: int, progress: Progress) -> FileDigest:
    digest, n_bytes = hashlib.sha256(), 0
    while block := os.read(fd, _BLOCK_BYTES):
        digest.update(block)
        n_bytes += len(block)
        progress(len(block))
    return FileDigest(digest.hexdigest(), n_bytes)


def _check(found: os.stat_result, name: str, bytes_max: int, *, links_max: int | None) -> None:
    if not stat.S_ISREG(found.st_mode):
        raise UnsafeFileError(f"{name!r}: is not a regular file")
    if links_max is not None and found.st_nlink > links_max:
        raise UnsafeFileError(
            f"{name!r}: has a second name somewhere (a hard link); copy its bytes instead"
        )
    if found.st_size > bytes_max:
        raise UnsafeFileError(
            f"{name!r}: holds {found.st_size} bytes; {max(bytes_max, 0)} are allowed"
        )


def _copy(
    source: int,
    target: Path,
    name: str,
    bytes_max: int,
    progress: Progress,
    *,
    is_durable: bool = True,
) -> FileDigest:
    digest, n_bytes = hashlib.sha256(), 0
    with _writing(target):
        fd = _create(target)
    try:
        while block := os.read(source, _BLOCK_BYTES):
            n_bytes += len(block)
            if n_bytes > bytes_max:  # it grew since it was looked at
                raise UnsafeFileError(f"{name!r}: holds more than the {bytes_max} bytes allowed")
            digest.update(block)
            with _writing(target):
                _write(fd, block)
            progress(len(block))
        if is_durable:
            with _writing(target):
                _sync(fd)
    finally:
        os.close(fd)
    return FileDigest(digest.hexdigest(), n_bytes)


def _rename_if_absent(temporary: Path, path: Path) -> bool:
    with Lease(path.parent / ".create.lock"):
        if path.exists():
            return False
        _step("rename")
        temporary.rename(path)
    return True


@contextlib.contextmanager
def _temporary(
    path: Path, data: bytes, *, is_durable: bool, mode: int = 0o644
) -> Iterator[tuple[Path, int]]:
    """The bytes under a name of their own beside `path`, locked while this process lives."""
    while True:
        temporary = path.parent / f".{path.name}.{secrets.token_hex(8)}{_TEMPORARY}"
        _step("create")
        fd = os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, mode)
        with contextlib.suppress(OSError):  # without locks it stays until somebody removes it
            fcntl.flock(fd, fcntl.LOCK_EX)
        if os.fstat(fd).st_nlink:
            break
        os.close(fd)  # swept between the two calls
    try:
        _write(fd, data)
        if is_durable:
            _sync(fd)
        yield temporary, fd
    finally:
        with contextlib.suppress(OSError):  # the next writer sweeps it
            _step("remove temporary")
            temporary.unlink(missing_ok=True)
        os.close(fd)


def _remove_if_dead(temporary: Path) -> bool:
    try:
        fd = os.open(temporary, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if _is_same(fd, temporary):
            temporary.unlink()
            return True
    except OSError:
        pass
    finally:
        os.close(fd)
    return False


def _create(path: Path) -> int:
    """Open a new file that nobody may write to once it is closed."""
    _step("create")
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    return os.open(path, flags, 0o444)


def _write(fd: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        _step("write")
        view = view[os.write(fd, view) :]  # a write may take less than it was given


def _sync(fd: int) -> None:
    # After a failed fsync the pages count as clean: trying again would report a success that is
    # none. So a failure ends the whole attempt, and the file is thrown away.
    _step("fsync")
    os.fsync(fd)


def _is_same(fd: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(fd), path.stat(follow_symlinks=False))
    except FileNotFoundError:
        return False


@contextlib.contextmanager
def _writing(path: Path) -> Iterator[None]:
    """Say what could not be written, by its name and without its path."""
    try:
        yield
    except OSError as error:
        raise WriteError(path.name, error) from error


def _step(name: str) -> None:
    steps(name)
