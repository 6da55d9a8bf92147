"""What this host and these directories can do: asked by doing it, in files of its own.

Everything that driftgate promises about files rests on a few calls of the file system. Whether they
do here what they must is tried out, instead of read from a list of file systems.
"""

import contextlib
import os
import secrets
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from registry import catalog, gc, store
from registry.catalog import Catalog
from registry.errors import RegistryError, WriteError

_NETWORK = ("nfs", "cifs", "smb", "fuse", "9p", "lustre", "ceph", "gluster", "afs", "virtiofs")
_SKEW_S_MAX = 5.0
_FREE_BYTES_MIN = 1 << 30
_FREE_SHARE_MIN = 0.05
_FSYNC_S_SLOW = 0.25
_ROOMS = ("gateway", "registry", "monitors")


@dataclass(frozen=True, slots=True)
class Finding:
    """What one look found."""

    what: str
    state: str
    """ok, warning or failure."""
    detail: str


def examine(registry: Path, state_dir: Path, *, workers: int) -> list[Finding]:
    """Try out what has to work; nothing is left behind."""
    found: list[Finding] = [_packages()]
    try:
        seen = catalog.scan(registry)
    except RegistryError as error:
        return [*found, Finding("registry", "failure", f"{registry}: {error}")]
    problems = len(seen.problems)
    n_versions = sum(map(len, seen.models.values()))
    found.append(
        Finding(
            "registry",
            "warning" if problems else "ok",
            f"{len(seen.models)} models, {n_versions} versions"
            + (f"; {problems} passed over (driftgate models lists them)" if problems else ""),
        )
    )
    for name, directory in (("registry", registry), ("state", state_dir)):
        found += _directory(name, directory)
    found.append(_memory(seen, workers))
    return found


def _directory(name: str, directory: Path) -> Iterator[Finding]:
    """Files of one directory: written, linked, renamed, locked, in time, with room."""
    place = directory
    while not place.is_dir():  # the state directory may not be made yet
        place = place.parent
    trial = place / f".doctor-{secrets.token_hex(4)}"
    try:
        trial.mkdir()
    except OSError as error:
        state = "warning" if name == "registry" else "failure"
        yield Finding(f"{name}: write", state, f"cannot be written to: {error.strerror}")
        yield _file_system(name, place)
        return
    try:
        for what, look in _LOOKS.items():
            try:
                state, detail = look(trial)
            except (OSError, WriteError) as error:
                state, detail = "failure", str(error)
            yield Finding(f"{name}: {what}", state, detail)
    finally:
        shutil.rmtree(trial, ignore_errors=True)
    yield _space(name, place)
    yield _file_system(name, place)


def _link(trial: Path) -> tuple[str, str]:
    first = store.create_if_absent(trial / "link", b"first")
    second = store.create_if_absent(trial / "link", b"second")
    if not first or second or (trial / "link").read_bytes() != b"first":
        return "failure", "a name can be made twice: two writers would both believe in theirs"
    try:
        os.link(trial / "link", trial / "other")
    except OSError:
        return "warning", "no hard links: names are made under a lock of the directory instead"
    return "ok", "a name is made once"


def _rename(trial: Path) -> tuple[str, str]:
    for name in ("one", "two"):
        (trial / name).mkdir()
        (trial / name / "file").touch()
    try:
        (trial / "one").rename(trial / "two")
    except OSError:
        (trial / "one").rename(trial / "three")
        return "ok", "a directory is renamed whole, and never onto another"
    return "failure", "a directory can be renamed onto one that holds files: a version could vanish"


def _lock(trial: Path) -> tuple[str, str]:
    first, second = store.Lease(trial / "lock"), store.Lease(trial / "lock")
    held = (first.acquire(), second.acquire())
    first.release()
    second.release()
    if held == (True, False):
        return "ok", "a lock has one holder"
    return "failure", "a lock can be held twice: hosts could both fold evidence and run rollouts"


def _clock(trial: Path) -> tuple[str, str]:
    before = time.time()
    skew_s = gc.now_of(trial) - before
    if abs(skew_s) > _SKEW_S_MAX:
        return "warning", (
            f"files are stamped {skew_s:+.0f} s from this host's clock; nothing is decided by it,"
            " but people will wonder"
        )
    return "ok", "files are stamped by a clock that agrees with this host's"


def _sync(trial: Path) -> tuple[str, str]:
    start = time.perf_counter()
    store.replace(trial / "sync", b"x")
    took_s = time.perf_counter() - start
    state = "warning" if took_s > _FSYNC_S_SLOW else "ok"
    return state, f"a small file is on disk after {took_s * 1e3:.0f} ms"


_LOOKS: dict[str, Callable[[Path], tuple[str, str]]] = {
    "link": _link,
    "rename": _rename,
    "lock": _lock,
    "clock": _clock,
    "fsync": _sync,
}


def _space(name: str, place: Path) -> Finding:
    found = shutil.disk_usage(place)
    is_low = found.free < _FREE_BYTES_MIN or found.free < found.total * _FREE_SHARE_MIN
    detail = f"{_mib(found.free)} of {_mib(found.total)} free"
    return Finding(f"{name}: space", "warning" if is_low else "ok", detail)


def _file_system(name: str, place: Path) -> Finding:
    kind = _kind(place)
    if kind.startswith(_NETWORK):
        return Finding(
            f"{name}: file system",
            "warning",
            f"{kind}: changes by other hosts are seen by looking, not by events; keep --run-dir on"
            " a local disk",
        )
    return Finding(f"{name}: file system", "ok", f"{kind}: local")


def _kind(place: Path) -> str:
    """The kind of file system that a directory is on."""
    best, kind = "", "unknown"
    with contextlib.suppress(OSError):
        real = os.path.realpath(place)
        for line in Path("/proc/mounts").read_text(encoding="utf-8", errors="replace").splitlines():
            words = line.split()
            point = words[1].replace("\\040", " ")
            is_above = real == point or real.startswith(point.rstrip("/") + "/")
            if is_above and len(point) >= len(best):
                best, kind = point, words[2]
    return kind


def _memory(seen: Catalog, workers: int) -> Finding:
    """What the newest version of every model would take, in every worker, of what there is."""
    needed = 0
    for versions in seen.models.values():
        newest = versions[-1]
        verdict = newest.manifest.verdict if newest.manifest else None
        # Unmeasured: weights are in memory once as they are, and again while they are prepared.
        needed += verdict.rss_bytes if verdict else 2 * gc.size_of(newest.directory)
    needed *= workers
    available = _available()
    detail = (
        f"the newest version of every model in {workers} worker{'s' if workers > 1 else ''}:"
        f" {_mib(needed)}; available: {_mib(available)}"
    )
    return Finding("memory", "warning" if needed > 0.75 * available else "ok", detail)


def _available() -> int:
    """Memory that this process may still get: of the machine, or of its control group."""
    found = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    with contextlib.suppress(OSError, ValueError, StopIteration):
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        line = next(line for line in lines if line.startswith("MemAvailable:"))
        found = int(line.split()[1]) * 1024
    with contextlib.suppress(OSError, ValueError):
        limit = int(Path("/sys/fs/cgroup/memory.max").read_text(encoding="ascii"))
        used = int(Path("/sys/fs/cgroup/memory.current").read_text(encoding="ascii"))
        found = min(found, max(limit - used, 0))
    return found


def _packages() -> Finding:
    """Another distribution with a package of the same name would be imported instead of ours."""
    owners = metadata.packages_distributions()
    others = {
        owner for room in _ROOMS for owner in owners.get(room, []) if owner.lower() != "driftgate"
    }
    if others:
        return Finding(
            "packages",
            "failure",
            f"{', '.join(sorted(others))} has packages named like ours ({', '.join(_ROOMS)});"
            " use an environment of its own",
        )
    version = metadata.version("onnxruntime")
    return Finding("packages", "ok", f"onnxruntime {version}")


def _mib(n_bytes: int) -> str:
    return f"{n_bytes / (1 << 20):,.0f} MiB"
