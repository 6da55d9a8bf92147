"""A look at a registry directory: what is there, and what is passed over with a reason."""

from pathlib import Path

import pytest

from registry import catalog
from registry.errors import RegistryError


def put(root: Path, *parts: str) -> None:
    path = root.joinpath(*parts)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"x")


def test_versions_are_sorted_as_numbers(tmp_path: Path) -> None:
    """10 comes after 9, though as text it comes before."""
    for version in ("10", "9", "2"):
        put(tmp_path, "fraud", version, "model.onnx")

    found = catalog.scan(tmp_path)

    assert [files.version for files in found.models["fraud"]] == [2, 9, 10]
    assert found.problems == ()


def test_strays_are_passed_over_and_named(tmp_path: Path) -> None:
    """One wrong entry never hides the right ones."""
    put(tmp_path, "fraud", "1", "model.onnx")
    for stray in ("٣", "01", "v2", "latest"):
        put(tmp_path, "fraud", stray, "model.onnx")
    put(tmp_path, "fraud", "3", "weights.bin")
    put(tmp_path, "empty", "readme.txt")
    put(tmp_path, "a b", "1", "model.onnx")
    put(tmp_path, ".git", "1", "model.onnx")
    put(tmp_path, ".driftgate", "HEAD")
    put(tmp_path, "notes.txt")

    found = catalog.scan(tmp_path)

    assert list(found.models) == ["fraud"]
    assert [files.version for files in found.models["fraud"]] == [1]
    said = "\n".join(found.problems)
    for words in ("'٣' is not a version", "'01'", "'v2'", "'latest'", "version 3: no model.onnx"):
        assert words in said
    assert "'empty': holds no version" in said
    assert "'a b': not a model name" in said
    assert ".git" not in said
    assert str(tmp_path) not in said


@pytest.mark.parametrize("kind", ["missing", "a file"])
def test_a_root_that_is_no_directory_is_an_error(tmp_path: Path, kind: str) -> None:
    """With the cause in words."""
    root = tmp_path / "registry"
    if kind == "a file":
        root.write_text("")

    with pytest.raises(RegistryError, match=r"no such directory|not a directory"):
        catalog.scan(root)


def test_a_link_to_a_version_counts_as_one(tmp_path: Path) -> None:
    """People link versions into place; a dangling link is passed over."""
    put(tmp_path, "store", "abc", "model.onnx")
    (tmp_path / "models" / "fraud").mkdir(parents=True)
    (tmp_path / "models" / "fraud" / "1").symlink_to(tmp_path / "store" / "abc")
    (tmp_path / "models" / "fraud" / "2").symlink_to(tmp_path / "nowhere")

    found = catalog.scan(tmp_path / "models")

    assert [files.version for files in found.models["fraud"]] == [1]
