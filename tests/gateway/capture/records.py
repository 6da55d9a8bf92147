"""Records to write, and files of them."""

from pathlib import Path
from typing import Any

from gateway.capture.record import HEAD_LINE, Record, TensorKept, framed, pack
from gateway.capture.shelf import Shelf


def record(k: int = 0, *, n_bytes: int = 0, **fields: Any) -> Record:
    """A record that says its number, of about so many bytes."""
    given = {
        "time": 1000.0 + k, "id": f"r-{k}", "model": "m", "revision": 3, "variant": "champion",
        "version": 7, "traffic": "primary", "reason": "SPLIT", "sampled": 1.0, "rows": 1,
        "seconds": 0.001,
    }  # fmt: skip
    if n_bytes:
        given["inputs"] = (TensorKept("x", "UINT8", (1, n_bytes), bytes(n_bytes)),)
    return Record(**given | fields)


def frames(*records: Record) -> bytes:
    """What a file holds behind its first line."""
    return b"".join(framed(pack(each)) for each in records)


def write(path: Path, *records: Record) -> Path:
    """A file of a capture."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(HEAD_LINE + frames(*records))
    return path


def shelf(directory: Path, worker: str = "0", **how: Any) -> Shelf:
    """A worker's hand on the files; small ones, unless said otherwise."""
    given = {"bytes_max": 256 * 1024, "segment_bytes_max": 64 * 1024, "days": 7.0}
    return Shelf(directory, worker, **given | how)
