"""A manifest says what the files beside it are, and is not believed when it does not."""

import hashlib
import subprocess
from pathlib import Path
from typing import Any

import msgspec
import pytest

from registry import manifest
from registry.errors import ManifestError
from registry.manifest import FileEntry, Manifest, SignatureEntry, TensorEntry
from registry.signature import Signature, TensorSpec

FILES = {
    "model.onnx": FileEntry(hashlib.sha256(b"model").hexdigest(), 5),
    "a data": FileEntry(hashlib.sha256(b"data").hexdigest(), 4),
}


def a_manifest(**changes: Any) -> Manifest:
    fields: dict[str, Any] = {
        "model": "fraud",
        "version": 7,
        "files": FILES,
        "digest": manifest.tree_digest(FILES),
        "signature": SignatureEntry(
            (TensorEntry("x", "FP32", (-1, 3)),), (TensorEntry("y", "FP32", (-1,)),)
        ),
        "lineage": {"data": ["tx-2026-10"], "of our own": {"deep": [1, None]}},
        "tags": {"ticket": "RISK-118"},
    }
    return Manifest(**(fields | changes))


def read(data: bytes) -> Manifest:
    return manifest.read(data, model="fraud", version=7)


def test_a_manifest_comes_back_as_it_went() -> None:
    """Lineage keeps keys that nobody here knows."""
    made = a_manifest()

    found = read(made.to_json())

    assert found == made
    assert found.to_json() == made.to_json()
    assert found.tensors() == Signature(
        (TensorSpec("x", "FP32", (-1, 3)),), (TensorSpec("y", "FP32", (-1,)),)
    )


def test_a_field_that_a_later_release_adds_is_passed_over() -> None:
    """Two releases may share a registry; the format number tells when they cannot."""
    document = msgspec.json.decode(a_manifest().to_json()) | {"later": 1}

    assert read(msgspec.json.encode(document)) == a_manifest()


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"format": 2}, "format 2; .* newer"),
        ({"version": 8}, "'fraud' version 8; the directory was copied"),
        ({"model": "other"}, "'other' version 7"),
        ({"digest": "sha256:00"}, "digest is not that of the files"),
        ({"files": {"../x": {"sha256": "00", "bytes": 1}}}, "no name of a file"),
        ({"files": {"a\nb": {"sha256": "00", "bytes": 1}}}, "no name of a file"),
        ({"files": {"model.onnx": {"sha256": "00"}}}, "bytes"),
        ({"signature": None}, r"\$\.signature"),
        ({"tags": {"a": 1}}, r"\$\.tags"),
    ],
)
def test_what_is_wrong_is_said(change: dict[str, Any], reason: str) -> None:
    """And nothing of it is used."""
    document = msgspec.json.decode(a_manifest().to_json()) | change

    with pytest.raises(ManifestError, match=reason):
        read(msgspec.json.encode(document))


@pytest.mark.parametrize("data", [b"", b"{", b"[]", b"[" * 100_000, b"\xff", b"{}"])
def test_what_is_no_manifest_is_refused(data: bytes) -> None:
    """Whatever it is."""
    with pytest.raises(ManifestError, match=r"manifest\.json: "):
        read(data)


def test_the_digest_of_a_version_can_be_made_by_anybody(tmp_path: Path) -> None:
    """`sha256sum * | sha256sum`, files sorted by name."""
    (tmp_path / "model.onnx").write_bytes(b"model")
    (tmp_path / "a data").write_bytes(b"data")

    told = subprocess.run(
        ["bash", "-c", "LC_ALL=C sha256sum * | sha256sum"],
        cwd=tmp_path,
        capture_output=True,
        check=True,
        text=True,
    ).stdout.split()[0]

    assert manifest.tree_digest(FILES) == f"sha256:{told}"


def test_equal_files_have_equal_digests_in_any_order() -> None:
    """And another byte or name gives another."""
    back = dict(reversed(FILES.items()))
    other = {**FILES, "a data": FileEntry(hashlib.sha256(b"DATA").hexdigest(), 4)}
    renamed = {"model.onnx": FILES["model.onnx"], "b data": FILES["a data"]}

    digests = [manifest.tree_digest(files) for files in (FILES, back, other, renamed)]

    assert digests[0] == digests[1]
    assert len(set(digests)) == 3
