"""The thread that writes: never waited for, nothing lost uncounted, labels after predictions."""

import asyncio
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ml_dtypes
import msgpack
import numpy as np
import pytest

from gateway.counters import Region
from gateway.labels import Asked, Observed, PredictionLog, StoreError, ids
from gateway.labels.log import LogMeters
from gateway.labels.rows import Bounds, Kept, Label
from gateway.labels.store import Store
from gateway.tensors import BFLOAT16, datatype
from registry.signature import Signature, TensorSpec
from tests.serving import wait_until


class FakeStore:
    """Keeps rows in a list; fails, or waits, when told to."""

    def __init__(self) -> None:
        self.rows: list[Kept] = []
        self.is_failing = False
        self.gate = threading.Event()
        self.gate.set()

    def keep(self, rows: list[Kept]) -> int:
        self.gate.wait(10)
        if self.is_failing:
            raise StoreError("no space left")
        self.rows += rows
        return len(rows)

    def label(self, labels: list[Label], _now: float, **_: object) -> list[str]:
        known = {row.request for row in self.rows}
        return ["joined" if label.request in known else "unknown" for label in labels]

    def forget(self, _bounds: Bounds, _now: float) -> int:
        return 0

    def close(self) -> None:
        pass


@pytest.fixture
def store() -> FakeStore:
    return FakeStore()


@pytest.fixture
def log(store: FakeStore) -> Iterator[PredictionLog]:
    made = make(store, queue_rows_max=10)
    made.start()
    yield made
    store.gate.set()
    made.stop()


def make(store: Any, **options: Any) -> PredictionLog:
    region = Region()
    meters = LogMeters(*(region.counter() for _ in range(4)))
    bounds = Bounds(days=30, bytes_max=2**30, wait_s=60)
    return PredictionLog(store, **{"share": 1.0, "bounds": bounds, "meters": meters, **options})


def observed(*requests: Asked, **tensors: Any) -> Observed:
    n = sum(asked.rows for asked in requests)
    outputs = tensors or {"score": np.arange(n, dtype=np.float32)}
    signature = Signature(
        (TensorSpec("x", "INT64", (-1, 1)),),
        tuple(TensorSpec(name, datatype(array), (-1,)) for name, array in outputs.items()),
    )
    arrays = list(outputs.values())
    return Observed("m", 1, requests, signature, arrays, (np.arange(n)[:, None],), time=5.0)


def unpacked(rows: list[Kept]) -> list[dict[str, Any]]:
    return [msgpack.unpackb(row.outputs) for row in rows]


def test_rows_of_each_request_are_kept_with_what_the_gateway_knew(
    log: PredictionLog, store: FakeStore
) -> None:
    """Two requests that ran together keep their own rows, in order."""
    log.record(
        observed(Asked("a", 2, "champion"), Asked("b", 1, "challenger", "primary", 0.05, "u"))
    )
    wait_until(lambda: len(store.rows) == 3, "written")

    assert [(row.request, row.row) for row in store.rows] == [("a", 0), ("a", 1), ("b", 0)]
    assert [found["score"] for found in unpacked(store.rows)] == [0.0, 1.0, 2.0]
    last = store.rows[2]
    assert (last.variant, last.assigned, last.unit, last.time) == ("challenger", 0.05, "u", 5.0)
    assert last.inputs is None


def test_every_kind_of_tensor_is_kept_or_left_out_by_rule(store: FakeStore) -> None:
    """Texts, matrices and half floats are kept; what is too wide or has no rows is not."""
    log = make(store, elements_max=3, with_inputs=True)
    brain = np.array([1.5, -2.0], dtype=ml_dtypes.bfloat16).view(np.uint16).view(BFLOAT16)
    log.record(
        observed(
            Asked("a", 2, "champion"),
            word=np.array(["x", "ü"], dtype=object),
            p=np.float64([[0.25, 0.75], [0.5, 0.5]]),
            half=brain,
            one=np.int64([[7], [8]]),
            truth=np.array([True, False]),
            wide=np.zeros((2, 4)),
            summary=np.zeros(1),
            scalar=np.float32(1),
        )
    )
    log.start()
    log.stop()

    assert unpacked(store.rows) == [
        {"word": "x", "p": [0.25, 0.75], "half": 1.5, "one": 7, "truth": True},
        {"word": "ü", "p": [0.5, 0.5], "half": -2.0, "one": 8, "truth": False},
    ]
    assert [msgpack.unpackb(row.inputs or b"") for row in store.rows] == [{"x": 0}, {"x": 1}]


def test_only_the_share_of_requests_is_kept_and_its_probability_with_it(store: FakeStore) -> None:
    """By id, so that whoever is asked about a label knows; times what sampled it before."""
    log = make(store, share=0.25)
    for k in range(400):
        log.record(observed(Asked(f"r{k}", 1, "champion", sampled=0.5)))
    log.start()
    log.stop()

    assert {row.request for row in store.rows} == {
        f"r{k}" for k in range(400) if ids.is_kept(f"r{k}", 0.25)
    }
    assert {row.sampled for row in store.rows} == {0.125}


def test_while_the_disk_says_no_predictions_wait_and_what_is_lost_is_counted(
    log: PredictionLog, store: FakeStore
) -> None:
    """The queue holds ten rows: the eleventh and on are lost, counted, and nobody waits."""
    store.is_failing = True
    start = time.perf_counter()
    for k in range(15):
        log.record(observed(Asked(f"r{k}", 1, "champion")))
    assert time.perf_counter() - start < 1
    wait_until(lambda: log.problem is not None, "the problem is known")
    store.is_failing = False
    wait_until(lambda: log.problem is None, "the problem is over", timeout_s=15)

    assert log.meters.lost_full.value == 5
    assert [row.request for row in store.rows] == [f"r{k}" for k in range(10)]
    assert log.meters.kept.value == 10


def test_a_store_that_hangs_is_nobodys_business(log: PredictionLog, store: FakeStore) -> None:
    """Recording takes no longer; what does not fit is counted."""
    store.gate.clear()
    log.record(observed(Asked("first", 1, "champion")))
    time.sleep(0.3)  # the thread hangs now; nothing to wait for can show it
    start = time.perf_counter()
    for k in range(100):
        log.record(observed(Asked(f"r{k}", 1, "champion")))

    assert time.perf_counter() - start < 0.5
    assert log.meters.lost_full.value == 91


def test_a_label_sees_the_predictions_recorded_before_it(log: PredictionLog) -> None:
    """Although they are written later than recorded: what waits goes first."""
    log.record(observed(Asked("a", 1, "champion")))

    verdicts = asyncio.run(log.label([Label("a", 0, "m", 1.0), Label("b", 0, "m", 1.0)]))

    assert verdicts == ["joined", "unknown"]


def test_whoever_asks_is_told_when_it_fails(log: PredictionLog, store: FakeStore) -> None:
    """An exception goes to the one who asked; the thread lives on."""

    def fail(*_: Any, **__: Any) -> list[str]:
        raise StoreError("read-only")

    label = store.label
    store.label = fail  # type: ignore[method-assign]
    with pytest.raises(StoreError, match="read-only"):
        asyncio.run(log.label([Label("a", 0, "m", 1.0)]))
    store.label = label  # type: ignore[method-assign]

    assert asyncio.run(log.label([Label("a", 0, "m", 1.0)])) == ["unknown"]


def test_at_the_end_what_waits_is_written(store: FakeStore) -> None:
    """And what cannot be is counted."""
    log = make(store)
    log.start()
    log.record(observed(Asked("a", 3, "champion")))
    log.stop()
    assert len(store.rows) == 3

    other = FakeStore()
    other.is_failing = True
    log = make(other)
    log.start()
    log.record(observed(Asked("a", 3, "champion")))
    log.stop()
    assert log.meters.lost_unwritten.value == 3


def test_keeping_a_row_costs_little(tmp_path: Path) -> None:
    """Twenty thousand rows within seconds, disk included: some tens of microseconds a row."""
    log = make(Store(f"sqlite:///{tmp_path / 'l.sqlite3'}"))
    log.start()
    start = time.perf_counter()
    for k in range(200):
        log.record(observed(Asked(f"r{k}", 100, "champion")))
    log.stop(30)
    seconds = time.perf_counter() - start

    assert log.meters.kept.value == 20_000
    assert seconds < 10
