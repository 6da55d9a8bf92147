"""Verdicts: one level shared by all guards, no data is inconclusive, hard breaches need none."""

import json
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from monitors.guards import power, slow, verdict
from monitors.guards.evidence import Evidence, count
from monitors.guards.units import Units
from monitors.guards.verdict import Exposure, Guard, Peaks, judge
from tests.monitors.guards.simulation import ALPHA, events_until_found, four_errors

GUARDS = (
    Guard(name="error_rate", kind="harm", event="error"),
    Guard(name="slow_requests", kind="harm", event="slow", ratio_max=1.2),
    Guard(name="output_shift", kind="shift", action="hold"),
    Guard(name="input_balance", kind="inputs", action="invalid"),
    Guard(name="srm", kind="balance", action="invalid", alpha=0.001),
    Guard(name="ceiling_error_rate", kind="ceiling", event="error", share_max=0.2),
)
SEEN = Exposure(is_long_enough=True, units=500, units_min=200)
WEIGHT = (500, 9500)


def evidence(candidate=500, control=9500, **events):
    tables = {kind: {WEIGHT: np.array(counts)} for kind, counts in events.items()}
    return Evidence(
        requests={WEIGHT: np.array([candidate, control])},
        units={WEIGHT: np.array([candidate, control])},
        events=tables,
        all_events={kind: np.array(counts) for kind, counts in events.items()},
    )


def test_nothing_found_and_enough_seen_is_ok() -> None:
    """Errors fall on both as the weight says."""
    assert judge(evidence(error=(5, 95)), GUARDS, alpha=ALPHA, exposure=SEEN).kind == "ok"


@pytest.mark.parametrize(
    ("exposure", "words"),
    [
        (Exposure(is_long_enough=True, units=3, units_min=200), "3 of 200 units"),
        (Exposure(is_long_enough=False, units=300, units_min=200), "long enough"),
        (
            Exposure(is_long_enough=True, units=300, units_min=200, no_worse_than=1.25),
            "not yet shown",
        ),
    ],
)
def test_too_little_seen_is_inconclusive_and_says_what_is_missing(exposure, words) -> None:
    """No data is neither success nor failure."""
    for met in (Evidence(), evidence(error=(1, 10))):
        found = judge(met, GUARDS, alpha=ALPHA, exposure=exposure)
        assert found.kind == "inconclusive"
        assert words in found.reason


def test_harm_is_a_breach_that_names_guard_counts_and_evidence() -> None:
    """Forty errors of five hundred against one per cent."""
    found = judge(evidence(error=(40, 95)), GUARDS, alpha=ALPHA, exposure=SEEN)

    assert (found.kind, found.action) == ("breach", "abort")
    assert "error_rate: candidate 40 of 500, control 95 of 9500" in found.reason
    plain = json.loads(json.dumps(found.to_dict(), allow_nan=False))
    assert plain["guards"][0]["breach"] is True
    assert plain["guards"][0]["evidence_needed"] == pytest.approx(500)


def test_a_hard_breach_needs_no_statistics() -> None:
    """A worker was killed with the candidate's request in hand."""
    found = judge(Evidence(), GUARDS, alpha=ALPHA, exposure=SEEN, hard=["worker died: SIGSEGV"])

    assert (found.kind, found.action, found.reason) == ("breach", "abort", "worker died: SIGSEGV")


def test_a_wrong_ratio_makes_the_rollout_invalid_and_not_the_candidate_bad() -> None:
    """Twice as many units as the weight says."""
    found = judge(evidence(candidate=1000), GUARDS, alpha=ALPHA, exposure=SEEN)

    assert (found.kind, found.action) == ("invalid", "invalid")
    assert "srm" in found.reason


def test_shifted_outputs_hold_and_shifted_inputs_invalidate() -> None:
    """The same counts mean different things on either side of the model."""
    shifted = np.array([[5, 950], [20, 950], [60, 950], [15, 950]])
    for channel, kind, action in (
        ("output:score[0]", "breach", "hold"),
        ("input:x[0]", "invalid", "invalid"),
    ):
        met = evidence()
        met.bins[channel] = {WEIGHT: shifted}
        found = judge(met, GUARDS, alpha=ALPHA, exposure=SEEN)
        assert (found.kind, found.action) == (kind, action)


def test_a_ceiling_needs_no_control() -> None:
    """Both err one time in three: no harm by comparison, but more than the ceiling allows."""
    found = judge(evidence(error=(170, 3200)), GUARDS, alpha=ALPHA, exposure=SEEN)

    assert found.kind == "breach"
    assert "ceiling_error_rate" in found.reason
    assert "error_rate: candidate" not in found.reason.replace("ceiling_error_rate", "")


def test_a_crossing_counts_although_evidence_falls_back() -> None:
    """Anything else would be looking until it suits."""
    peaks = Peaks()
    judge(evidence(error=(40, 95)), GUARDS, alpha=ALPHA, exposure=SEEN, peaks=peaks)

    later = judge(evidence(error=(40, 2000)), GUARDS, alpha=ALPHA, exposure=SEEN, peaks=peaks)

    assert later.kind == "breach"


def test_the_level_is_shared_by_the_guards() -> None:
    """Five share one per cent; the sample ratio has its own."""
    bounds = verdict.log_bounds(GUARDS, 0.01)

    assert bounds["error_rate"] == pytest.approx(math.log(500))
    assert bounds["srm"] == pytest.approx(math.log(1000))


def test_all_guards_together_abort_one_rollout_in_a_hundred_at_most() -> None:
    """No difference, a ramp and a trend; twelve looks at all guards of 1,000 rollouts."""
    random = np.random.default_rng(2)
    n_rollouts, aborted, stopped = 1000, 0, 0
    guards = GUARDS[:-1]
    steps = [(100, 9900), (500, 9500), (2000, 8000), (5000, 5000)]
    for _ in range(n_rollouts):
        met, peaks = Evidence(), Peaks()
        for look in range(12):
            weight = steps[look // 3]
            share = weight[0] / 10_000
            n, rate = 2000, 0.005 * 2 ** (look // 3)
            table = random.multinomial(n, np.full(10, 0.1))
            split = random.binomial(table, share)
            bins = np.stack([split, table - split], axis=-1)
            bad = random.binomial([split.sum(), n - split.sum()], rate)
            slow_ones = random.binomial([split.sum(), n - split.sum()], 0.05)
            units = {weight: bins.sum(axis=0)}
            met = met + Evidence(
                requests=units,
                units=units,
                events={"error": {weight: bad}, "slow": {weight: slow_ones}},
                bins={"output:y[0]": {weight: bins}},
            )
            found = judge(met, guards, alpha=ALPHA, exposure=SEEN, peaks=peaks)
            if found.kind in ("breach", "invalid"):
                aborted += found.action == "abort"
                stopped += 1
                break

    assert aborted / n_rollouts <= ALPHA
    assert stopped / n_rollouts <= ALPHA + 0.001 + four_errors(n_rollouts)


units_seen = st.lists(st.tuples(st.integers(0, 2**64 - 1), st.integers(0, 3)), max_size=60)


@settings(deadline=None, max_examples=60)
@given(one=units_seen, other=units_seen)
def test_units_are_counted_once_however_workers_met_them(one, other) -> None:
    """Folding both workers' sets, in any order and again and again, counts each unit once."""
    workers = [Units(), Units()]
    for worker, met in zip(workers, (one, other), strict=True):
        for unit, code in met:
            worker.add(unit, bytes([code]))
    folded = Units()
    counted = sum(
        folded.add(unit, code)
        for worker in (*workers, *workers)
        for unit, code in Units.from_dict(json.loads(json.dumps(worker.to_dict())))
    )

    assert counted == len({unit for unit, _ in one + other}) == len(folded)


def test_a_full_set_of_units_halves_its_threshold_and_counts_on_by_hash() -> None:
    """Bounded memory; those counted later are a share of the hashes, whatever their variant."""
    random = np.random.default_rng(3)
    hashes = random.integers(0, 2**64 - 1, 40_000, dtype=np.uint64).tolist()
    is_candidate = (random.random(40_000) < 0.3).tolist()
    units = Units(units_max=1000)
    counted = [0, 0]
    for unit, candidate in zip(hashes, is_candidate, strict=True):
        counted[candidate] += units.add(unit, bytes([candidate]))

    assert len(units) <= 1000
    assert 2000 < sum(counted) < 8000
    assert counted[1] / sum(counted) == pytest.approx(0.3, abs=4 * math.sqrt(0.21 / 3000))
    assert not any(units.add(unit, b"\0") for unit in hashes)


def test_evidence_of_workers_adds_up_and_survives_json() -> None:
    """Any order, any grouping, through a file."""
    one, other = evidence(error=(3, 7)), evidence(slow=(1, 2))
    count(other.bins.setdefault("output:y[0]", {}), (2000, 8000), 0, bin_=3, bins=10)
    other.seconds = np.zeros((slow.N_BINS, 2), np.int64)
    other.seconds[7] = 4, 5
    other.pairs = {"n": 9, "differ": 1}

    total = Evidence.from_dict(json.loads(json.dumps((one + other).to_dict())))

    assert total.to_dict() == (other + one).to_dict()
    assert total.requests[WEIGHT].tolist() == [1000, 19_000]
    assert total.seconds.sum() == 9


def test_a_threshold_is_the_controls_quantile_to_ten_per_cent() -> None:
    """Frozen from 200 requests on; before that there is none."""
    random = np.random.default_rng(4)
    seconds = random.lognormal(-5, 0.5, 20_000)
    counts = np.bincount([slow.bin_of(s) for s in seconds], minlength=slow.N_BINS)

    frozen = slow.threshold(counts, 0.95)

    assert 1 <= frozen / np.quantile(seconds, 0.95) <= 1.1
    assert slow.threshold(counts * 0, 0.95) is None


@pytest.mark.parametrize(
    ("margin", "events"),
    [(1.1, (13_500, 4_050, 2_640)), (1.25, (2_370, 720, 480)), (2, (210, 70, 50))],
)
def test_showing_no_worse_costs_as_many_bad_events_as_theory_says(margin, events) -> None:
    """At weights of 5, 20 and 50 %."""
    for weight, expected in zip((0.05, 0.2, 0.5), events, strict=True):
        assert power.events_to_show_no_worse(margin, weight) == pytest.approx(expected, rel=0.03)


def test_power_is_close_to_what_simulated_rollouts_need() -> None:
    """The plan may promise too little, by half, but not more than it keeps."""
    random = np.random.default_rng(5)
    for weight, rate, ratio in ((0.05, 0.01, 5), (0.2, 0.01, 2), (0.2, 0.001, 10), (0.5, 0.01, 2)):
        planned = power.requests_needed(rate, ratio, weight, log_bound=math.log(100))
        found = np.median(events_until_found(random, 600, int(3 * planned), rate, ratio, weight))
        assert 0.9 < planned / found < 1.7


def test_what_a_step_cannot_see_is_said_in_words() -> None:
    """5 % of 200 requests an hour, for a day."""
    sights = [
        power.Sight(4800, rate, power.detectable_ratio(4800, rate, 0.05, log_bound=math.log(500)))
        for rate in (0.01, 0.0001)
    ]

    said = power.sentence(0.05, 200, 24, sights)

    assert said.startswith("5 % of 200 requests/h: within 24 h this step sees 1 % -> ")
    assert power.detectable_ratio(0, 0.01, 0.05, log_bound=5) == math.inf
