"""`driftgate profile`: what cannot be a reference is refused in one line, never half believed."""

import json
from pathlib import Path

import numpy as np
import pytest

from monitors import Profile
from tests import models
from tests.serving import driftgate


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("data")
    for name, text in {
        "good.csv": "x\n1\n2\n3\n",
        "empty.csv": "",
        "header.csv": "x,y\n",
        "twice.csv": "x,x\n1,2\n",
        "ragged.csv": "x,y\n1,2\n3\n",
        "words.csv": "x\na\nb\n",
        "large.csv": "x\n300\n1\n",
        "fraction.csv": "x\n1.5\n1\n",
        "holes.csv": "x\n1\nNA\n",
    }.items():
        (root / name).write_text(text)
    (root / "bytes.csv").write_bytes(bytes(range(256)))
    (root / "cut.npz").write_bytes(b"PK\x03\x04 and nothing more")
    np.save(root / "one.npy", np.zeros(3))
    (root / "one.npy").rename(root / "one.npz")
    np.savez(root / "objects.npz", x=np.array([{}, 1], object))
    np.savez(root / "unequal.npz", a=np.zeros(3, np.float32), b=np.zeros(2, np.float32))
    np.savez(root / "matrix.npz", x=np.zeros((3, 2), np.float32))
    (root / "float.onnx").write_bytes(models.identity())
    (root / "byte.onnx").write_bytes(models.identity("INT8"))
    (root / "pair.onnx").write_bytes(models.identity("FP32", ("n", 2)))
    (root / "broken.onnx").write_bytes(b"no model")
    return root


@pytest.mark.parametrize(
    ("data", "model", "said"),
    [
        ("absent.csv", None, ["absent.csv", "no such file"]),
        ("empty.csv", None, ["empty.csv", "empty"]),
        ("header.csv", None, ["header.csv", "no rows"]),
        ("twice.csv", None, ["twice.csv", "'x'"]),
        ("ragged.csv", None, ["ragged.csv", "line 3"]),
        ("bytes.csv", None, ["bytes.csv"]),
        ("cut.npz", None, ["cut.npz"]),
        ("one.npz", None, ["one.npz"]),
        ("objects.npz", None, ["objects.npz"]),
        ("unequal.npz", None, ["'input:b'", "2", "3"]),
        ("unequal.npz", "pair.onnx", ["'b'", "2", "3"]),
        ("matrix.npz", "float.onnx", ["'x'"]),
        ("words.csv", "float.onnx", ["'x'", "'a'", "FP32"]),
        ("large.csv", "byte.onnx", ["'x'", "300", "INT8"]),
        ("fraction.csv", "byte.onnx", ["'x'", "1.5", "INT8"]),
        ("holes.csv", "byte.onnx", ["'x'", "missing", "INT8"]),
        ("good.csv", "broken.onnx", ["cannot be opened"]),
        ("good.csv", "absent.onnx", ["cannot be opened"]),
    ],
)
def test_data_that_is_no_reference_is_refused_in_one_line(
    place: Path, tmp_path: Path, data: str, model: str | None, said: list[str]
) -> None:
    """Exit code 2, the file or column by name, and nothing written.

    A value that the model's datatype cannot hold is refused like in a request: wrapped around, it
    would make a reference that no served row can match.
    """
    words = ["--model", str(place / model)] if model else []
    ended = driftgate("profile", str(place / data), *words, "-o", str(tmp_path / "out.json"))

    assert ended.returncode == 2, (ended.returncode, ended.stderr)
    assert len(ended.stderr.splitlines()) == 1, ended.stderr
    for word in said:
        assert word in ended.stderr
    assert not (tmp_path / "out.json").exists()


def test_a_profile_of_a_model_holds_its_inputs_and_outputs(place: Path, tmp_path: Path) -> None:
    """What is written is read back: channels by name, rows counted, values in the model's type."""
    out = tmp_path / "reference.json"
    ended = driftgate(
        "profile", str(place / "good.csv"), "--model", str(place / "float.onnx"), "-o", str(out)
    )
    profile = Profile.from_json(out.read_bytes())

    assert (ended.returncode, ended.stderr) == (0, "")
    assert list(profile.channels) == ["input:x", "output:y"]
    assert profile.n_rows == 3
    assert {channel["dtype"] for channel in json.loads(out.read_text())["channels"]} == {"float32"}
