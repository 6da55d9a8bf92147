"""Counters and the text that Prometheus reads, checked by Prometheus's own parser."""

import itertools
import logging

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client.parser import text_string_to_metric_families

from gateway import telemetry
from gateway.counters import Region
from gateway.telemetry import (
    BATCH_ROWS,
    DRIFT_SCORE,
    FAMILIES,
    REQUEST_SECONDS,
    REQUESTS,
    Telemetry,
)


@given(st.lists(st.floats(0, 100)), st.lists(st.floats(0.001, 50), min_size=1, unique=True))
def test_a_histogram_counts_every_value_in_its_bin(
    values: list[float], bounds: list[float]
) -> None:
    """A value on a bound belongs below it; the sum is exact to a nanosecond a value."""
    edges = sorted(bounds)
    histogram = Region().histogram(edges, 10**9)
    for value in values:
        histogram.observe(value)

    below = [sum(value <= edge for value in values) for edge in edges]

    assert list(itertools.accumulate(histogram.counts))[:-1] == below
    assert sum(histogram.counts) == len(values)
    assert histogram.total == pytest.approx(sum(values), abs=1e-9 * (len(values) + 1))


def test_cells_stay_where_they_are_while_the_region_grows() -> None:
    """A hot path keeps block and index: later series must not move or share them."""
    region = Region()
    counters = [region.counter() for _ in range(5000)]
    for k, counter in enumerate(counters):
        counter.add(k)

    assert [counter.value for counter in counters] == list(range(5000))


def test_the_exposition_is_what_prometheus_reads() -> None:
    """Names, labels and values come back through an independent parser."""
    made = Telemetry()
    made.counter(REQUESTS, "fraud", "1", "champion", "primary", "ok").add(3)
    histogram = made.histogram(BATCH_ROWS, "fraud", "1")
    for rows in (1, 5, 64, 5000):
        histogram.observe(rows)
    scores = {DRIFT_SCORE: [(("fraud", "1", 'in"put:\\x\n', "psi"), float("nan"))]}

    text, _ = made.exposition(scores)
    families = {family.name: family for family in text_string_to_metric_families(text.decode())}

    assert families["driftgate_requests"].samples[0].value == 3
    rows = {
        sample.labels.get("le", sample.name): sample.value
        for sample in families["driftgate_batch_rows"].samples
    }
    assert rows["1.0"] == 1
    assert rows["64.0"] == 3
    assert rows["+Inf"] == 4
    assert rows["driftgate_batch_rows_sum"] == 5070
    assert families["driftgate_drift_score"].samples[0].labels["feature"] == 'in"put:\\x\n'


def test_every_family_is_named_as_the_field_does() -> None:
    """The prefix, the base unit, and _total exactly where something is counted."""
    for family in FAMILIES:
        assert family.name.startswith("driftgate_")
        assert family.name.endswith("_total") == (family.kind == "counter")
        assert family.help.endswith(".")
    assert REQUEST_SECONDS.bounds == tuple(sorted(REQUEST_SECONDS.bounds))


def test_log_lines_are_one_line_whatever_a_field_holds(capsys: pytest.CaptureFixture[str]) -> None:
    """A client's text can neither begin a new line nor move the cursor."""
    logger = logging.getLogger("driftgate")
    before = logger.handlers[:], logger.level, logger.propagate
    try:
        for style in ("json", "text"):
            telemetry.start_logging(style, "info")
            telemetry.event("opened", model="a\nb\x1b[2J")
    finally:
        logger.handlers, logger.level, logger.propagate = before
    as_json, as_text = capsys.readouterr().err.splitlines()

    assert orjson.loads(as_json)["model"] == "a\nb\x1b[2J"
    assert "\x1b" not in as_text
    assert as_text.endswith("opened model=a\\x0ab\\x1b[2J")
