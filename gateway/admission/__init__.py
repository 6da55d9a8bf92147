"""First look at an unknown model file, in a child process bounded in time and memory.

Reading a model runs native code on bytes that somebody else made: it may crash, loop or take all
memory. So the first process to open a file is one that nobody misses. What it found is a verdict;
what ended it is a reason.
"""

import contextlib
import os
import signal
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import msgspec
import onnxruntime

from gateway.admission import forkserver, graph
from gateway.admission.forkserver import Request
from gateway.errors import VersionRefusedError, shown
from registry import catalog, manifest, store
from registry.errors import RegistryError
from registry.manifest import FileEntry, Manifest, Runtime, SignatureEntry, Verdict
from registry.store import FileDigest

RUNTIME = f"onnxruntime {onnxruntime.__version__}"
_MIB = 1 << 20
_BYTES_A_SECOND = 50_000_000


@dataclass(frozen=True, slots=True, kw_only=True)
class Bounds:
    """What a model may take until it is opened and has answered once."""

    seconds: float = 30.0
    """From the call to the verdict, and one more for each 50 MB of files; CPU time is bounded by
    the same."""
    memory_bytes: int = 512 * _MIB
    """Beyond what the child needs before it opens the model, and four times the size of its
    files."""
    file_bytes: int = 2 << 30
    """Size of the model file itself: protobuf ends there. Weights beside it may be larger."""


class Admitted(msgspec.Struct, frozen=True):
    """What the child found."""

    signature: SignatureEntry
    runtime: Runtime
    load_s: float
    run_s: float
    rss_bytes: int
    flagged: tuple[str, ...]

    def verdict(self, digest: str) -> Verdict:
        """As the manifest of a version with these files states it."""
        return Verdict(
            digest, RUNTIME, self.load_s, self.run_s, self.rss_bytes, tuple(self.flagged)
        )


class Report(msgspec.Struct, frozen=True):
    """What the child writes, a line each: where it is, and in the end one of the others."""

    stage: str = ""
    refused: str = ""
    admitted: Admitted | None = None


BOUNDS = Bounds()


def admit(directory: Path, bounds: Bounds = BOUNDS) -> Admitted:
    """Open the model of a version directory in a child process, and run it once.

    The directory must be one that nobody else writes to: a staged version, or a private copy.
    Blocks until there is a verdict; call it from a thread where that matters.

    Raises
    ------
    VersionRefusedError : it cannot be served, with the reason.
    """
    size = _check_files(directory, bounds)
    memory = bounds.memory_bytes + 4 * size
    seconds = bounds.seconds + size // _BYTES_A_SECOND
    file = (directory / catalog.MODEL_FILE).absolute()  # Who opens it may be elsewhere by now.
    request = Request(str(file), memory, seconds)
    looked = forkserver.look(request, seconds)
    report = _last(looked.written)
    if report.admitted is not None:
        return report.admitted
    raise VersionRefusedError(
        report.refused or _end(report.stage, looked.code, seconds, is_late=looked.is_late)
    )


def external_files(model_file: Path) -> list[str]:
    """Names of the files of weights that an ONNX file needs beside it.

    Raises
    ------
    VersionRefusedError : it is no ONNX file, or a name leads out of its directory.
    """
    try:
        found = graph.read(model_file)
    except OSError as error:
        raise VersionRefusedError(f"cannot be read: {error.strerror}") from None
    for name in found.external:
        _check_name(name)
    return sorted(found.external)


def model_digest(files: Mapping[str, FileEntry | FileDigest]) -> str:
    """The digest of those files of a version that the runtime opens; a verdict speaks of it."""
    beside = {catalog.REFERENCE_FILE, catalog.WARMUP_FILE, catalog.GOLDEN_FILE}
    return manifest.tree_digest({name: files[name] for name in files if name not in beside})


def is_known(described: Manifest | None) -> bool:
    """Whether the manifest has a verdict on just these files by the runtime in use here.

    The caller has compared the digests of his copy with the manifest's.
    """
    if described is None or described.verdict is None:
        return False
    verdict = described.verdict
    return verdict.runtime == RUNTIME and verdict.digest == model_digest(described.files)


def _check_files(directory: Path, bounds: Bounds) -> int:
    """Hold the files against what the model names; their size in bytes."""
    model_file = directory / catalog.MODEL_FILE
    try:
        present = catalog.content(directory)
        folder = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.close(store.open_inside(folder, catalog.MODEL_FILE, bytes_max=bounds.file_bytes))
            for name in (needed := external_files(model_file)):
                if name not in present:
                    raise VersionRefusedError(
                        f"cannot be opened: its weights are in {shown(name)}, which is not there"
                    )
                os.close(store.open_inside(folder, name, bytes_max=sys.maxsize))
        finally:
            os.close(folder)
    except FileNotFoundError:
        raise VersionRefusedError(f"no {catalog.MODEL_FILE} in it") from None
    except OSError as error:
        raise VersionRefusedError(f"cannot be read: {error.strerror}") from None
    except RegistryError as error:
        raise VersionRefusedError(f"cannot be opened: {error}") from None
    return sum((directory / name).stat().st_size for name in {catalog.MODEL_FILE, *needed})


def _check_name(name: str) -> None:
    if not name or "/" in name or "\\" in name or name in {".", ".."} or "\0" in name:
        raise VersionRefusedError(
            f"cannot be opened: its weights are said to be in {shown(name)}; they must be in a"
            " file of its own directory"
        )


def _last(written: bytes) -> Report:
    """The child's last whole line; what it wrote is not believed blindly."""
    for line in reversed(written.split(b"\n")):
        with contextlib.suppress(msgspec.DecodeError, msgspec.ValidationError):
            return msgspec.json.decode(line, type=Report)
    return Report()


def _end(stage: str, code: int, seconds: float, *, is_late: bool) -> str:
    doing = {"run": "answered a row of zeros", "open": "was opened"}.get(stage, "was looked at")
    if is_late or code == -signal.SIGXCPU:
        return f"cannot be served: {seconds:g} s were over before it {doing}"
    if code < 0:
        name = signal.Signals(-code).name
        return f"cannot be served: the process that looked at it died before it {doing} ({name})"
    return f"cannot be served: the process that looked at it ended before it {doing}"
