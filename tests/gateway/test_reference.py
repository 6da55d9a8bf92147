"""Reference data to profiles: what the model will be given, no less and no more."""

from pathlib import Path

import numpy as np
import pytest

from gateway import reference
from gateway.demo import sample
from gateway.errors import BadRequestError
from gateway.publisher import publish
from monitors import Budget, Monitor, Profile
from monitors.loss import LossReference
from tests import models
from tests.serving import driftgate


def write(directory: Path, text: str) -> Path:
    file = directory / "data.csv"
    file.write_text(text, encoding="utf-8")
    return file


def test_columns_get_the_type_that_their_values_have(tmp_path: Path) -> None:
    """Whole numbers, numbers with gaps, text with gaps; nothing else is guessed."""
    file = write(tmp_path, "n,x,city,gap\n1,1.5,Bonn,\n2,NA,,\n3,-2e3,Köln,nan\n")

    columns = reference.read(file)

    assert columns["n"].tolist() == [1, 2, 3]
    assert columns["n"].dtype == np.int64
    np.testing.assert_array_equal(columns["x"], [1.5, np.nan, -2000])
    assert columns["city"].tolist() == ["Bonn", None, "Köln"]
    assert np.isnan(columns["gap"]).all()


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "is empty"),
        ("a,b\n", "no rows"),
        ("a,b\n1,2\n3\n", "line 3 has 1 fields, the header has 2"),
        ("a,a\n1,2\n", "two columns are named 'a'"),
    ],
)
def test_a_file_that_is_no_table_is_refused_with_the_line(
    tmp_path: Path, text: str, words: str
) -> None:
    """The sentence says where, and names the file without its directory."""
    with pytest.raises(BadRequestError, match=words) as refused:
        reference.read(write(tmp_path, text))
    assert str(tmp_path) not in str(refused.value)


def test_npz_is_read_without_objects(tmp_path: Path) -> None:
    """Arrays yes, pickles never."""
    plain, objects = tmp_path / "plain.npz", tmp_path / "objects.npz"
    np.savez(plain, x=np.arange(3.0))
    np.savez(objects, x=np.array([{}], dtype=object), allow_pickle=True)

    assert reference.read(plain)["x"].tolist() == [0, 1, 2]
    with pytest.raises(BadRequestError, match="cannot be read"):
        reference.read(objects)


def test_the_reference_of_a_model_is_without_drift_against_itself() -> None:
    """Cast to the model's datatypes before binning: the same inputs score exactly zero."""
    rows = sample.reference()
    profile = reference.fit_to_model(rows, sample.model_path("january_march"), {})
    assert set(profile.channels) == {f"input:{name}" for name in rows} | {"output:probability"}

    monitor = Monitor(profile, budget=Budget(rows=500_000), window_rows=sample.load().n_rows)
    monitor.update({f"input:{name}": values for name, values in rows.items()})

    for channel in monitor.report("total").channels:
        if channel.name.startswith("input:"):
            assert channel.scores["psi"].value == 0, channel.name


def test_columns_go_to_a_matrix_in_their_order(tmp_path: Path) -> None:
    """One matrix input takes the columns as they stand, in its datatype."""
    (tmp_path / "model.onnx").write_bytes(models.identity("FP32", ("n", 2)))

    profile = reference.fit_to_model(
        {"a": np.array([0.1, 0.2, 0.3]), "b": np.array([1, 2, 3])}, tmp_path / "model.onnx", {}
    )

    assert [name.split(":")[0] for name in profile.channels] == ["input"] * 2 + ["output"] * 2
    assert all(name.endswith(("[0]", "[1]")) for name in profile.channels)


def test_classes_and_confidence_of_a_classifier_are_channels(tmp_path: Path) -> None:
    """Of probabilities both, of the label beside them the class; of other matrices nothing."""
    draw = np.random.default_rng(3)
    columns = {f"c{k}": draw.normal(size=400).astype(np.float32) for k in range(3)}
    file = models.put(tmp_path, "m", 1, models.classifier()) / "model.onnx"

    profile = reference.fit_to_model(columns, file, {})

    made = {
        "output:probabilities.class": "categorical",
        "output:probabilities.confidence": "numeric",
        "output:label.class": "categorical",
    }
    assert {n: c.kind for n, c in profile.channels.items() if n in made} == made
    likeliest = np.stack(list(columns.values()), axis=1).argmax(axis=1)
    channel = profile.channels["output:probabilities.class"]
    assert dict(zip(channel.bins, channel.counts.tolist(), strict=True)) == {
        **{str(k): (likeliest == k).sum() for k in range(3)}, "other": 0, "unseen": 0,
        "missing": 0, "invalid": 0,
    }  # fmt: skip

    other = models.put(tmp_path, "n", 1, models.identity("FP32", ("n", 3))) / "model.onnx"
    assert not [name for name in reference.fit_to_model(columns, other, {}).channels if "." in name]


@pytest.mark.parametrize(
    ("columns", "words"),
    [
        ({"a": np.zeros(3)}, "takes 2 columns, the data has 1"),
        ({"a": np.zeros(3), "b": np.array(["x", "1", None], object)}, "column 'b': row 1 is 'x'"),
    ],
)
def test_data_that_the_model_does_not_take_is_refused_by_column(
    tmp_path: Path, columns: dict[str, np.ndarray], words: str
) -> None:
    """Which column, which row, and what the model takes."""
    (tmp_path / "model.onnx").write_bytes(models.identity("FP32", ("n", 2)))

    with pytest.raises(BadRequestError, match=words):
        reference.fit_to_model(columns, tmp_path / "model.onnx", {})


def test_labelled_rows_become_what_labels_are_compared_with(tmp_path: Path) -> None:
    """By command and by publish, alike; what does not fit is named."""
    draw = np.random.default_rng(1)
    x = draw.random(1000).astype(np.float32)
    came = (draw.random(1000) < x).astype(int)
    table = tmp_path / "held_out.csv"
    table.write_text(
        "x,came\n" + "\n".join(f"{a!r},{b}" for a, b in zip(x.tolist(), came, strict=True))
    )
    model = tmp_path / "model.onnx"
    model.write_bytes(models.identity())
    (tmp_path / "models").mkdir()

    made = driftgate("profile", "held_out.csv", "--model", "model.onnx", "--target", "came",
                     "-o", "reference.json", cwd=tmp_path)  # fmt: skip
    assert made.returncode == 0, made.stderr
    assert "1000 labelled rows, binary" in made.stdout
    beside = LossReference.from_json((tmp_path / "labels.json").read_text())
    assert beside.loss_mean == pytest.approx(
        float(-np.log(np.where(came == 1, x, 1 - x)).mean()), rel=1e-5
    )
    profile = Profile.from_json((tmp_path / "reference.json").read_text())
    assert "input:came" not in profile.channels

    published = publish(tmp_path / "models", "m", model, reference=table, target="came")
    kept = tmp_path / "models" / "m" / str(published.version) / "labels.json"
    assert LossReference.from_json(kept.read_text()).loss_counts.tolist() == (
        beside.loss_counts.tolist()
    )
    for given, said in (
        ({"labels": table}, "names its column"),
        ({"labels": table, "target": "went"}, "no column"),
        ({"target": "came"}, "of which data"),
        ({"labels": tmp_path / "reference.json"}, "is lacking"),
    ):
        with pytest.raises(BadRequestError, match=said):
            publish(tmp_path / "models", "m", model, **given)
    named = {"x": x[:400]}
    truth = np.where(came[:400] == 1, "late", "punctual").astype(object)
    with pytest.raises(BadRequestError, match="--positive"):
        reference.fit_labels(named, truth, model, {})
    found = reference.fit_labels(named, truth, model, {}, declared={"positive": "late"})
    assert found.part_counts[:, 1].sum() == came[:400].sum()
