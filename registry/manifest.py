"""What `manifest.json` of a version says: digests, signature, lineage, tags, the trial load.

It describes the other files of its directory and is written last. The digest of a version is made
of its files' digests alone, so equal files have equal digests wherever they are, and anybody can
make it again: `LC_ALL=C sha256sum * | sha256sum` over the files, sorted by name.
"""

import hashlib
from collections.abc import Mapping
from typing import Any

import msgspec

from registry import names
from registry.errors import ManifestError
from registry.signature import DATATYPES, Signature, TensorSpec
from registry.store import FileDigest

FILE = "manifest.json"
SEAL_FILE = "manifest.sig"
"""An Ed25519 signature of the bytes of `manifest.json` (registry/trust.py)."""
FORMAT = 1
"""Number of the format written; a reader refuses a higher one."""
BYTES_MAX = 4 << 20


class FileEntry(msgspec.Struct, frozen=True):
    """One file of the version."""

    sha256: str
    """Of its bytes, in hexadecimal digits."""
    bytes: int
    """How many."""


class TensorEntry(msgspec.Struct, frozen=True):
    """One tensor of the signature."""

    name: str
    datatype: str
    """As in the Open Inference Protocol: FP32, INT64, BYTES, ..."""
    shape: tuple[int, ...]
    """Sizes of the axes, -1 where any will do."""


class SignatureEntry(msgspec.Struct, frozen=True):
    """What the model takes and gives, in its own order."""

    inputs: tuple[TensorEntry, ...]
    outputs: tuple[TensorEntry, ...]


class Runtime(msgspec.Struct, frozen=True):
    """What it takes to run the model."""

    opsets: dict[str, int] = {}
    """Version of the operators by domain; the empty name is ONNX's own."""
    providers: tuple[str, ...] = ("cpu",)
    """Where it can run."""


class Verdict(msgspec.Struct, frozen=True):
    """What the trial load found, when the version was published.

    It speaks of files by their digest: a worker that holds the same files need not try them in a
    child process again.
    """

    digest: str
    """Of the model file and its external data, put together as the digest of a version is."""
    runtime: str
    """Name and release of what ran it: `onnxruntime 1.32.0`."""
    load_s: float
    """Seconds to open it."""
    run_s: float
    """Seconds of the first run, on zeros; 0 when no made-up input was accepted."""
    rss_bytes: int
    """Memory that opening and running it took."""
    flagged: tuple[str, ...] = ()
    """Operators that may take unbounded time or memory, by their name."""


class Manifest(msgspec.Struct, frozen=True, kw_only=True):
    """One version, described."""

    format: int = FORMAT
    """Number of this format."""
    model: str
    """Name of the model."""
    version: int
    """Number of the version; a manifest speaks of no other."""
    digest: str
    """`sha256:` and the digest over names and digests of the files."""
    files: dict[str, FileEntry]
    """Every file of the version but the manifest and its seal."""
    signature: SignatureEntry
    """Tensors in and out."""
    runtime: Runtime = Runtime()
    """What it takes to run the model."""
    verdict: Verdict | None = None
    """What the trial load found."""
    lineage: dict[str, Any] = {}
    """Where it comes from: parents, data, code, run, metrics, and whatever else was given."""
    tags: dict[str, str] = {}
    """Free labels, not interpreted."""
    created: str = ""
    """When it was published (UTC); for people, nothing is decided by it."""

    def to_json(self) -> bytes:
        """The bytes of `manifest.json`: equal manifests give equal bytes."""
        packed = msgspec.json.encode(self, order="deterministic")
        return msgspec.json.format(packed, indent=2) + b"\n"

    def tensors(self) -> Signature:
        """The signature as the gateway uses it."""
        return Signature(
            tuple(_spec(entry) for entry in self.signature.inputs),
            tuple(_spec(entry) for entry in self.signature.outputs),
        )

    @property
    def bytes(self) -> int:
        """Size of all files."""
        return sum(entry.bytes for entry in self.files.values())


def read(data: bytes, *, model: str, version: int) -> Manifest:
    """Read the manifest of this version, and believe nothing of it unchecked.

    Raises
    ------
    ManifestError : it is none, belongs to another version, or was written by a newer driftgate.
    """
    if len(data) > BYTES_MAX:
        raise ManifestError(f"{len(data)} bytes; at most {BYTES_MAX} are read")
    try:
        number = msgspec.json.decode(data, type=_Head).format
        if number > FORMAT:
            raise ManifestError(
                f"format {number}; this driftgate reads up to {FORMAT}: it was published by a"
                " newer one"
            )
        found = msgspec.json.decode(data, type=Manifest)
    except (msgspec.ValidationError, msgspec.DecodeError, RecursionError) as error:
        raise ManifestError(str(error)) from None
    if (found.model, found.version) != (model, version):
        raise ManifestError(
            f"it speaks of {found.model[:128]!r} version {found.version}; the directory was"
            " copied or renamed by hand. Publish its files instead, or remove manifest.json"
        )
    if wrong := [name for name in found.files if not names.is_file(name)]:
        raise ManifestError(f"{wrong[0][:128]!r} is no name of a file")
    if found.digest != tree_digest(found.files):
        raise ManifestError("its digest is not that of the files it lists")
    for entry in (*found.signature.inputs, *found.signature.outputs):
        if entry.datatype not in DATATYPES:
            raise ManifestError(f"tensor {entry.name[:128]!r}: no datatype {entry.datatype[:32]!r}")
    return found


def tree_digest(files: Mapping[str, FileEntry | FileDigest]) -> str:
    """The digest of a version: over the lines `<sha256>  <name>`, sorted by name."""
    lines = (f"{files[name].sha256}  {name}\n" for name in sorted(files))
    return "sha256:" + hashlib.sha256("".join(lines).encode()).hexdigest()


def entries(files: Mapping[str, FileDigest]) -> dict[str, FileEntry]:
    """Digests of files as a manifest lists them."""
    return {name: FileEntry(files[name].sha256, files[name].bytes) for name in sorted(files)}


def signature_entry(signature: Signature) -> SignatureEntry:
    """A signature as a manifest lists it."""
    return SignatureEntry(
        tuple(TensorEntry(spec.name, spec.datatype, spec.shape) for spec in signature.inputs),
        tuple(TensorEntry(spec.name, spec.datatype, spec.shape) for spec in signature.outputs),
    )


class _Head(msgspec.Struct):
    format: int


def _spec(entry: TensorEntry) -> TensorSpec:
    return TensorSpec(entry.name, entry.datatype, entry.shape)
