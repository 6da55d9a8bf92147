"""The exported file, read by those who did not write it: pyarrow and DuckDB."""

import random
from pathlib import Path

import duckdb
import numpy as np
import pyarrow.parquet as pq
import pytest

from gateway.capture.record import kept
from gateway.labels.rows import Kept, Label, pack
from gateway.labels.store import Store
from registry.signature import TensorSpec
from tests.gateway.capture.records import record, write
from tests.serving import driftgate

N = 25_000


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Many predictions, a third with a label; kinds that change on the way."""
    directory = tmp_path_factory.mktemp("export")
    store = Store(f"sqlite:///{directory / 'labels.sqlite3'}")
    random.seed(1)
    store.keep([
        Kept(f"r{k}", 0, "fraud", 7, "primary", "champion", 1.7e9 + k, 0.25 if k % 2 else 0.5, 1.0,
             None, pack({"score": k / N, "word": "ä" if k % 2 else "b", "p": [0.5, 0.5]}),
             pack({"amount": k if k < 15_000 else k + 0.5, "place": f"p{k % 3}"}))
        for k in range(N)
    ])  # fmt: skip
    labels = [Label(f"r{k}", 0, "fraud", float(k % 2)) for k in range(0, N, 3)]
    store.label(labels, 1.8e9, is_kept=[True] * len(labels))
    store.close()
    file = directory / "fraud.parquet"
    url = f"sqlite:///{directory / 'labels.sqlite3'}"
    ended = driftgate("export", "fraud", "--to", str(file), "--url", url, "--since", "2023-11-14")
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout == f"{file}: {N} predictions\n"
    assert [path.name for path in directory.glob(".*")] == []
    return file


def test_pyarrow_reads_every_row_with_its_types(exported: Path) -> None:
    """Whole numbers that turned fractions are fractions; lists are lists; times are in UTC."""
    table = pq.read_table(exported)

    assert table.num_rows == N
    types = {field.name: str(field.type) for field in table.schema}
    assert types["ts"] == "timestamp[us, tz=UTC]"
    assert (types["features.amount"], types["features.place"]) == ("double", "string")
    assert (types["output.score"], types["score"]) == ("double", "double")
    assert types["output.p"].startswith("list<")
    assert types["output.word"] == "string"
    first = table.slice(0, 1).to_pylist()[0]
    assert (first["prediction_id"], first["version"], first["actual"]) == ("r0/0", 7, 0.0)
    assert first["schema_version"] == 1


def test_duckdb_weighs_what_was_sampled(exported: Path) -> None:
    """Half of the rows were kept with probability 1/4: weights undo that, and nothing else does."""
    with duckdb.connect() as connection:
        plain, weighted, labelled = connection.execute(
            """SELECT avg((("output.word") = 'ä')::int),
                      sum(sample_weight * (("output.word") = 'ä')::int) / sum(sample_weight),
                      count(actual) FROM read_parquet(?)""",
            [str(exported)],
        ).fetchone() or (0, 0, 0)

    assert plain == pytest.approx(1 / 2, abs=0.001)
    assert weighted == pytest.approx(2 / 3, abs=0.001)
    assert labelled == len(range(0, N, 3))


def test_a_wrong_question_leaves_no_file(exported: Path) -> None:
    """No such model, output, or time: a line, exit code 2, nothing half written."""
    url = f"sqlite:///{exported.with_name('labels.sqlite3')}"
    for words, said in (
        (("nobody",), "no predictions of model 'nobody'"),
        (("fraud", "--score", "scor"), "no output 'scor'"),
        (("fraud", "--since", "yesterday"), "is no time"),
        (("fraud", "--since", "1h"), "no predictions"),
    ):
        file = exported.with_name("wrong.parquet")
        since = () if "--since" in words else ("--since", "2023-11-14")
        ended = driftgate("export", *words, *since, "--to", str(file), "--url", url)
        assert (ended.returncode, said in ended.stderr) == (2, True), ended.stderr
        assert not file.exists()


def test_a_capture_is_exported_with_the_weight_of_its_sample(tmp_path: Path) -> None:
    """Whoever counts weighs by the inverse of the probability that a unit was captured with."""
    x = kept([TensorSpec("x", "FP32", (-1,))], [np.array([1, 2], np.float32)])
    made = [record(k, rows=2, sampled=0.25, inputs=x, outputs=x) for k in range(50)]
    capture, file = write(tmp_path / "1.capture", *made), tmp_path / "m.parquet"
    words = ("export", "m", "--capture", str(capture), "--to", str(file), "--since", "1970-01-01")
    ended = driftgate(*words)
    assert ended.returncode == 0, ended.stderr

    rows = pq.read_table(file).to_pylist()
    assert len(rows) == 100
    assert {row["sample_weight"] for row in rows} == {4.0}
    assert rows[1]["prediction_id"] == "r-0/1"
    assert (rows[1]["features.x"], rows[1]["output.x"], rows[1]["actual"]) == (2.0, 2.0, None)
