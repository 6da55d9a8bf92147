"""A capture as rows for an export."""

from pathlib import Path

import numpy as np

from gateway.capture.reading import Reading
from gateway.capture.record import kept
from gateway.capture.rows import CapturedRows
from gateway.tensors import narrowed
from registry.signature import TensorSpec
from tests.gateway.capture.records import record, write


def test_rows_are_those_of_the_tensors(tmp_path: Path) -> None:
    """A number as such, a wider tensor as a list, another rank as nothing; errors are no rows."""
    tensors = {
        "n": np.array([[1.5], [2.5]], np.float32),
        "wide": np.array([[1, 2], [3, 4]], np.int64),
        "half": narrowed(np.array([0.5, 0.25], np.float32)),
        "word": np.array(["a", "b"], object),
        "all": np.array([7, 8, 9]),
    }
    specs = [TensorSpec(name, "", ()) for name in tensors]
    given = kept(specs, [*tensors.values()])
    answered = kept([TensorSpec("y", "FP64", (-1,))], [np.array([0.1, 0.2])])
    file = write(
        tmp_path / "1.capture",
        record(1, rows=2, sampled=0.25, inputs=given, outputs=answered),
        record(2, rows=2, served=5, outputs=answered),
        record(3, rows=2, code="model_failed", inputs=given),
        record(4, rows=2, model="n", outputs=answered),
        record(5000, rows=2, outputs=answered),
    )
    source = CapturedRows(lambda: Reading([file]))

    for _ in range(2):  # an export reads twice
        chunks = list(source.exported("m", since=0, until=2000, chunk=3))
        assert [len(chunk) for chunk in chunks] == [3, 1]
        first, second, hop, _ = (row for chunk in chunks for row in chunk)
        assert (first.request, first.row, first.sampled, first.version) == ("r-1", 0, 0.25, 7)
        assert first.inputs == {"n": 1.5, "wide": [1, 2], "half": 0.5, "word": "a"}
        assert (second.outputs, second.row) == ({"y": 0.2}, 1)
        assert (hop.version, hop.traffic, hop.inputs) == (5, "fallback", None)
