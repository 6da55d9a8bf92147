"""The tables: what is kept once, what becomes of a label, what is let go. SQLite here.

`make test-services` runs the same file against a real PostgreSQL: see tests/services.
"""

import os
import resource
import sqlite3
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gateway.labels.rows import Bounds, Kept, Label, StoreError, Verdict, pack
from gateway.labels.store import Store

DAY_S = 86_400.0
WIDE = Bounds(days=30, bytes_max=2**40, wait_s=3600)
POSTGRES = os.environ.get("DRIFTGATE_TEST_POSTGRES")
only_sqlite = pytest.mark.skipif(POSTGRES is not None, reason="about files of SQLite")


@pytest.fixture
def url(tmp_path: Path) -> str:
    """An empty database."""
    if POSTGRES is None:
        return f"sqlite:///{tmp_path / 'deep' / 'labels.sqlite3'}"
    import sqlalchemy as sa

    engine = sa.create_engine(POSTGRES)
    with engine.begin() as connection:
        for name in ("about", "predictions", "labels"):
            connection.exec_driver_sql(f"DROP TABLE IF EXISTS driftgate_{name}")
    engine.dispose()
    return POSTGRES


@pytest.fixture
def store(url: str) -> Iterator[Store]:
    store = Store(url)
    yield store
    store.close()


def kept(request: str, row: int = 0, **changed: object) -> Kept:
    values = {
        "request": request, "row": row, "model": "m", "version": 1, "traffic": "primary",
        "variant": "champion", "time": 1000.0, "sampled": 0.5, "assigned": 0.95, "unit": None,
        "outputs": pack({"score": 0.25}), "inputs": None,
    } | changed  # fmt: skip
    return Kept(**values)


def label(store: Store, *labels: Label, now: float = 2000.0, is_kept: bool = True) -> list[Verdict]:
    return store.label(labels, now, is_kept=[is_kept] * len(labels))


def test_a_prediction_meets_its_label(store: Store) -> None:
    """What was stored comes back beside the label: probabilities, variant, outputs."""
    store.keep([kept("a", unit="f00d"), kept("b")])

    assert label(store, Label("a", 0, "m", 1.0)) == ["joined"]
    (found,) = store.joined("m", 1)
    assert (found.request, found.row, found.label) == ("a", 0, 1.0)
    assert (found.sampled, found.assigned, found.variant) == (0.5, 0.95, "champion")
    assert (found.unit, found.outputs, found.arrived) == ("f00d", {"score": 0.25}, 2000.0)
    assert store.count("m") == (2, 1)


def test_labels_are_told_apart(store: Store) -> None:
    """Joined, sent twice, sent twice with another value, unknown, not sampled."""
    store.keep([kept("a")])

    assert label(store, Label("a", 0, "m", 1.0)) == ["joined"]
    assert label(store, Label("a", 0, "m", 1.0)) == ["duplicate"]
    assert label(store, Label("a", 0, "m", 0.0)) == ["conflict"]
    assert label(store, Label("a", 1, "m", 0.0)) == ["unknown"]
    assert label(store, Label("c", 0, "m", 0.0), is_kept=False) == ["not_sampled"]
    assert [found.label for found in store.joined("m")] == [1.0]


def test_a_label_sent_twice_in_one_request_counts_once(store: Store) -> None:
    """The second is a duplicate, or a conflict, exactly as in two requests."""
    one, same, other = (Label("a", 0, "m", value) for value in (1.0, 1.0, 0.0))

    assert label(store, one, same, other) == ["unknown", "duplicate", "conflict"]


def test_a_label_waits_for_its_prediction(store: Store) -> None:
    """Whichever comes first, they meet."""
    assert label(store, Label("a", 0, "m", 1.0)) == ["unknown"]
    assert store.joined("m") == []

    store.keep([kept("a")])

    assert [found.label for found in store.joined("m")] == [1.0]


def test_one_label_serves_the_primary_and_its_shadow(store: Store) -> None:
    """Both answered under one id; each version is judged by the same truth."""
    store.keep([kept("a"), kept("a", version=2, traffic="shadow", variant="2")])

    label(store, Label("a", 0, "m", 1.0))

    assert {(found.version, found.traffic) for found in store.joined("m")} == {
        (1, "primary"), (2, "shadow")
    }  # fmt: skip
    assert [found.version for found in store.joined("m", 2)] == [2]


def test_models_do_not_meet_each_others_labels(store: Store) -> None:
    """One id may be that of a whole trace through several models."""
    store.keep([kept("a"), kept("a", model="n")])

    label(store, Label("a", 0, "n", 7.0))

    assert store.joined("m") == []
    assert [found.label for found in store.joined("n")] == [7.0]
    assert store.rows_of(["a", "b"]) == {"a": {"m": 1, "n": 1}}


@settings(max_examples=15, deadline=None)
@given(st.lists(st.tuples(st.booleans(), st.integers(0, 5), st.integers(0, 1)), max_size=25))
def test_any_order_of_predictions_and_labels_ends_alike(
    tmp_path_factory: pytest.TempPathFactory, steps: list[tuple[bool, int, int]]
) -> None:
    """Repeated or not, early or late: joined are exactly the ids that had both, by first label."""
    store = Store(f"sqlite:///{tmp_path_factory.mktemp('order') / 'l.sqlite3'}")
    predicted: set[int] = set()
    labelled: dict[int, int] = {}
    for is_label, k, value in steps:
        if is_label:
            label(store, Label(f"r{k}", 0, "m", float(value)))
            labelled.setdefault(k, value)
        else:
            store.keep([kept(f"r{k}")])
            predicted.add(k)
    found = {joined.request: joined.label for joined in store.joined("m")}
    store.close()

    assert found == {f"r{k}": v for k, v in labelled.items() if k in predicted}


def test_cohorts_are_by_the_time_of_the_prediction(store: Store) -> None:
    """Whenever the label came; the newest rows when there are too many."""
    store.keep([kept(f"r{k}", time=float(k)) for k in range(10)])
    label(store, *[Label(f"r{k}", 0, "m", float(k)) for k in range(10)], now=1e6)

    def found(**bounds: float) -> list[float | str]:
        return [joined.label for joined in store.joined("m", **bounds)]

    assert found(since=3, until=6) == [3, 4, 5]
    assert found(rows_max=2) == [8, 9]


def test_what_is_over_is_late_and_later_unknown(store: Store) -> None:
    """After `days` the outputs are gone and a label is late; after twice that so is the id."""
    store.keep([kept("a", time=0.0), kept("b", time=25 * DAY_S)])

    assert store.forget(WIDE, now=31 * DAY_S) == 1
    assert label(store, Label("a", 0, "m", 1.0), Label("b", 0, "m", 1.0)) == ["late", "joined"]
    assert store.count("m") == (1, 1)
    store.forget(WIDE, now=61 * DAY_S)
    assert label(store, Label("a", 0, "m", 1.0), now=61 * DAY_S) == ["unknown"]


def test_a_label_goes_with_its_prediction_or_after_its_wait(store: Store) -> None:
    """None is kept for a prediction that will not come."""
    store.keep([kept("a", time=0.0)])
    label(store, Label("a", 0, "m", 1.0), Label("never", 0, "m", 1.0), now=1.0)

    store.forget(WIDE, now=3700.0)
    assert store.count("m") == (1, 1)
    store.forget(WIDE, now=31 * DAY_S)
    assert store.count("m") == (0, 0)


def test_beyond_the_bytes_the_oldest_go_first(store: Store) -> None:
    """The size is within the bound again, and what is left is the newest."""
    store.keep([kept(f"r{k}", time=float(k), outputs=b"\x91" + b"\xc0" * 900) for k in range(5000)])
    bound = store.bytes_kept() // 2

    forgotten = store.forget(Bounds(days=30, bytes_max=bound, wait_s=0), now=5000.0)

    assert store.bytes_kept() <= bound
    assert 0 < store.count("m")[0] == 5000 - forgotten
    assert store.rows_of(["r0", "r4999"]) == {"r4999": {"m": 1}}


def test_labels_without_predictions_are_bounded_too(store: Store) -> None:
    """Made-up ids fill nothing for longer than the bound allows."""
    label(store, *[Label(f"made-up-{k}", 0, "m", 1.0) for k in range(3000)], now=1.0)

    store.forget(Bounds(days=30, bytes_max=0, wait_s=1e9), now=2.0)

    assert store.count("m") == (0, 0)


def test_two_writers_at_once_lose_nothing(url: str) -> None:
    """Each waits for its turn: as several workers of a host, on one new database."""
    failures: list[StoreError] = []

    def write(name: str) -> None:
        store = Store(url)
        try:
            for k in range(20):
                store.keep([kept(f"{name}-{k}", row) for row in range(10)])
                label(store, Label(f"{name}-{k}", 0, "m", 1.0))
        except StoreError as error:
            failures.append(error)
        finally:
            store.close()

    threads = [threading.Thread(target=write, args=(name,)) for name in "abcd"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    store = Store(url)

    assert failures == []
    assert store.count("m") == (4 * 20 * 10, 80)
    assert len(store.joined("m")) == 80
    store.close()


def test_a_writer_that_is_killed_leaves_whole_transactions(url: str) -> None:
    """SIGKILL at any moment: each request's rows are all there or not at all, and others go on."""
    script = (
        "import sys; from gateway.labels.store import Store; from gateway.labels.rows import *\n"
        "store = Store(sys.argv[1]); k = 0\n"
        "while True:\n"
        "    rows = [(f'k{k}', r, 'm', 1, 'primary', 'c', 1.0, 1.0, 1.0, None, b'\\x80', None)\n"
        "            for r in range(50)]\n"
        "    store.keep([Kept(*row) for row in rows]); k += 1; print(k, flush=True)\n"
    )
    with subprocess.Popen([sys.executable, "-c", script, url], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if int(line) >= 5:
                break
        process.kill()
        process.stdout.read()
    store = Store(url)
    n, _ = store.count("m")

    assert n >= 250
    assert n % 50 == 0
    store.keep([kept("after"), kept("after")])
    assert store.count("m")[0] == n + 1
    store.close()


def test_tables_of_a_newer_release_are_refused(store: Store, url: str) -> None:
    """An older program does not guess what a newer one has written."""
    import sqlalchemy as sa

    store.keep([kept("a")])
    engine = sa.create_engine(url)
    with engine.begin() as connection:
        connection.exec_driver_sql("UPDATE driftgate_about SET value = 3")
    engine.dispose()
    other = Store(url)

    with pytest.raises(StoreError, match="format 3"):
        other.keep([kept("b")])
    other.close()


def test_export_gives_every_prediction_with_or_without_label(store: Store) -> None:
    """In the order of time, in chunks."""
    store.keep([kept(f"r{k}", time=float(k), inputs=pack({"x": k})) for k in range(25)])
    label(store, Label("r3", 0, "m", 1.0))

    chunks = list(store.exported("m", since=1, until=24, chunk=10))

    rows = [row for chunk in chunks for row in chunk]
    assert max(map(len, chunks)) <= 10
    assert [row.inputs for row in rows] == [{"x": k} for k in range(1, 24)]
    assert [row.label for row in rows if row.label is not None] == [1.0]


@only_sqlite
def test_the_file_is_nobody_elses_to_read(store: Store, url: str) -> None:
    """What is in it may be personal."""
    store.keep([kept("a")])
    file = Path(url.removeprefix("sqlite:///"))

    assert file.stat().st_mode & 0o077 == 0
    with sqlite3.connect(file) as connection:
        assert connection.execute("PRAGMA journal_mode").fetchone() == ("wal",)
    connection.close()


@only_sqlite
def test_a_full_disk_is_said_and_the_tables_stay_whole(store: Store) -> None:
    """A write that fails half-way leaves nothing; when there is room again, it goes on."""
    store.keep([kept("before")])
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (256 * 1024, hard))
    try:
        with pytest.raises(StoreError):
            store.keep([kept("full", row, outputs=b"\x91" + b"\xc0" * 900) for row in range(2000)])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))

    assert store.count("m") == (1, 0)
    store.keep([kept("after")])
    assert store.count("m") == (2, 0)


@only_sqlite
@pytest.mark.parametrize("what", ["no database", "a directory", "a directory above that is a file"])
def test_what_is_no_database_is_said_without_a_path(tmp_path: Path, what: str) -> None:
    """A reason for the log, not the machine's inside."""
    file = tmp_path / "labels.sqlite3"
    if what == "no database":
        file.write_bytes(b"not a database, and long enough to be sure" * 100)
    elif what == "a directory":
        file.mkdir()
    else:
        (tmp_path / "file").touch()
        file = tmp_path / "file" / "labels.sqlite3"
    store = Store(f"sqlite:///{file}")

    with pytest.raises(StoreError) as caught:
        store.keep([kept("a")])
    store.close()

    assert str(tmp_path) not in str(caught.value)
    assert str(caught.value)
