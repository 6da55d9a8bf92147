"""Shadows in process: what is copied and dropped, counted and concluded, against plain counting."""

import asyncio
import random
import threading
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gateway.comparison import compare
from gateway.errors import ModelFailedError
from gateway.labels.rows import Joined
from gateway.labels.target import Target
from gateway.protocol.call import Served
from gateway.router import Choice, Decision, Meters, Variant
from gateway.shadow import Copies, report, tally
from gateway.shadow.copier import Copier, key_of
from gateway.shadow.pacer import OWED_NS_MAX, Demand, Pacer
from gateway.shadow.tally import Coverage, Kept, Pairing, Places, Tally, numeric
from gateway.telemetry import SHADOW_DROPPED, SHADOW_PAIRS, Telemetry
from monitors.guards.units import Units
from registry.buckets import bucket_of_bytes
from registry.revisions import ModelState
from registry.routes import Route, Shadow, Tolerance
from registry.signature import Signature, TensorSpec

SIGNATURE = Signature((TensorSpec("x", "FP32", (-1, 1)),), (TensorSpec("y", "FP32", (-1, 1)),))


def pairing(**settings) -> Pairing:
    return Pairing("m", "9", 9, 7, Shadow(to=9, **settings))


# -- verdicts


@pytest.mark.parametrize(("true", "pairs"), [(0.03, 2_900), (0.04, 850), (0.10, 90)])
def test_a_shadow_that_disagrees_too_often_is_a_breach_after(true, pairs) -> None:
    """facts 3.3, d0 = 2 %: 3, 4 and 10 % are flagged after about 2,400, 690 and 62 pairs."""
    rng = np.random.default_rng(3)
    late = [
        not any(
            report.disagreement(n, int(differ[n - 1]), allowed=0.02)["breach"]
            for n in range(10, pairs, max(pairs // 40, 1))
        )
        for differ in (rng.random((60, pairs)) < true).cumsum(axis=1)
    ]
    assert sum(late) <= 30  # the median is below


def test_one_that_disagrees_as_much_as_allowed_is_hardly_ever_a_breach() -> None:
    """At every one of 40 looks at 2,000 pairs; 1 % of shadows is promised."""
    rng = np.random.default_rng(4)
    found = [
        any(
            report.disagreement(n, int(differ[n - 1]), allowed=0.02)["breach"]
            for n in range(50, 2_001, 50)
        )
        for differ in (rng.random((400, 2_000)) < 0.02).cumsum(axis=1)
    ]
    assert sum(found) <= 4 + 4 * 2


def test_few_pairs_show_nothing_and_many_that_agree_show_it() -> None:
    """No data is neither good nor bad."""
    nothing = report.disagreement(0, 0, allowed=0.02)
    assert (nothing["share"], nothing["breach"], nothing["below"]) == (None, False, False)
    assert not report.disagreement(100, 0, allowed=0.02)["below"]
    assert report.disagreement(400, 0, allowed=0.02)["below"]


def test_drops_above_one_per_cent_leave_the_verdict_open() -> None:
    """What was dropped came at busy times: what is left may not speak for all."""
    cover = Coverage()
    for k in range(1000):
        cover.sample(60.0 * (k % 3))
    cover.drop("inflight_max", 0.0, 10)
    assert not report.coverage(cover)["load_biased"]
    cover.drop("deadline_exceeded", 60.0)
    told = report.coverage(cover)
    assert told["load_biased"]
    assert told["share"] == pytest.approx(0.989)
    assert [(m["sampled"], m["dropped"], m["load_biased"]) for m in told["minutes"]] == [
        (334, 10, True), (333, 1, False), (333, 0, False),
    ]  # fmt: skip


def test_worst_bins_are_those_that_surely_disagree() -> None:
    """Three of four rows say less than 300 of 1,000; few rows are not listed at all."""
    counts = Tally(labels={"input:x": ["a", "b", "c", "d"]})
    counts.bins["input:x"] = np.array([[4, 1000, 1000, 30], [3, 300, 20, 2]])
    assert [(b["bin"], b["differ"]) for b in report.worst(counts)] == [
        ("b", 300), ("d", 2), ("c", 20),
    ]  # fmt: skip
    # Wilson's interval of 300 of 1,000, from a table.
    assert report.wilson_low(300, 1000) == pytest.approx(0.2724, abs=1e-4)


def joined(request, version, score, label, traffic="primary", unit=None) -> Joined:
    return Joined(
        request, 0, version, traffic, "x", 0.0, 1.0, 1.0, unit, {"score": score}, label, 0.0
    )


def test_labels_tell_who_is_wrong_alone_once_a_unit() -> None:
    """Both right or both wrong say nothing; a unit's second request does not count."""
    rows = []
    for k, (champion, shadow, label) in enumerate(
        [(0.9, 0.1, 1.0), (0.9, 0.1, 1.0), (0.1, 0.9, 1.0), (0.9, 0.8, 1.0), (0.9, 0.8, 0.0)]
    ):
        unit = "same" if k < 2 else None
        rows.append(joined(f"r{k}", 7, champion, label, unit=unit))
        rows.append(joined(f"r{k}", 9, shadow, label, "shadow", unit=unit))
    rows.append(joined("alone", 7, 0.9, 0.0))
    rows.append(joined("other", 7, 0.9, 0.0))
    rows.append(joined("other", 8, 0.1, 0.0, "shadow"))

    told = report.who_is_right(rows, pairing(), Target("score"), 0.5)

    assert (told["units"], told["shadow_alone"], told["champion_alone"]) == (4, 1, 1)
    assert not told["breach"]


def test_a_shadow_that_is_wrong_more_often_is_a_breach() -> None:
    """30 throws of a coin that always falls one way; numbers that are no scores go by distance."""
    rows = []
    for k in range(30):
        rows += [joined(f"r{k}", 7, 10.0, 11.0), joined(f"r{k}", 9, 14.0, 11.0, "shadow")]
    told = report.who_is_right(rows, pairing(), Target("score"), 0.5)
    assert (told["shadow_alone"], told["champion_alone"], told["breach"]) == (30, 0, True)


# -- counts

VALUES = st.lists(st.tuples(st.integers(0, 12), st.booleans(), st.integers(1, 3)), max_size=30)


@settings(max_examples=60, deadline=None)
@given(requests=VALUES, where=st.lists(st.booleans(), min_size=30, max_size=30))
def test_counts_of_two_workers_add_up_to_those_of_one(requests, where) -> None:
    """Written, read and added: as if one worker had met all, but for which pair was a unit's first.

    Unit 0 is none: such requests are their own.
    """
    one, parts = Tally(), (Tally(), Tally())
    places = Places("p", {"c": ("low", "high")}, lambda _, rows: {
        "c": np.minimum(np.arange(rows), 1)
    })  # fmt: skip
    first_of: dict[int, bool] = {}
    for (unit, differs, rows), is_left in zip(requests, where, strict=False):
        x = np.zeros((rows, 1), np.float32)
        found = compare({"y": x}, {"y": x + differs}, rows)
        columns = numeric({"y": x}, {"y": x + differs}, rows)
        first_of.setdefault(unit, differs)
        for counts in (one, parts[is_left]):
            counts.pair(unit or None, found, rows, columns=columns)
            counts.place(places, [x], found.differs)
    whole = Kept(pairing(), 1.0, tally=parts[0])
    total = Kept.from_json(whole.to_json()).tally
    total.add(Kept.from_json(Kept(pairing(), 1.0, tally=parts[1]).to_json()).tally)

    for name in ("requests", "rows", "rows_differ", "outputs", "single"):
        assert getattr(total, name) == getattr(one, name), name
    assert {name: counts.tolist() for name, counts in total.bins.items()} == {
        name: counts.tolist() for name, counts in one.bins.items()
    }
    n, differ = one.cases
    assert (
        total.cases[0]
        == n
        == len({u for u, _, _ in requests if u}) + sum(not u for u, _, _ in requests)
    )
    assert differ == sum(d for u, d, _ in requests if not u) + sum(
        d for u, d in first_of.items() if u
    )


def test_of_a_request_with_many_rows_one_counts() -> None:
    """Half of its rows differ: half of such requests do, not all."""
    counts, x = Tally(), np.zeros((2, 1), np.float32)
    found = compare({"y": x}, {"y": x + np.array([[0], [1]])}, 2)
    for _ in range(2000):
        counts.pair(None, found, 2, columns=[])
    n, differ = counts.cases
    assert (n, counts.rows_differ) == (2000, 2000)
    assert 850 < differ < 1150


def test_a_full_set_of_units_forgets_half_and_favours_none() -> None:
    """Shares stay right when there are more units than are remembered."""
    counts = Tally(units=Units(200))
    rng = random.Random(1)
    x = np.zeros((1, 1), np.float32)
    for _ in range(5000):
        found = compare({"y": x}, {"y": x + (rng.random() < 0.3)}, 1)
        counts.pair(rng.getrandbits(64), found, 1, columns=[])
    n, differ = counts.cases
    assert 100 <= n <= 200
    assert 0.15 < differ / n < 0.45


def test_a_file_that_is_cut_or_foreign_counts_nothing(tmp_path) -> None:
    """A writer may have been killed; a barred note lies beside."""
    good = Kept(pairing(), 5.0, tally=Tally(requests=3, single=[3, 1]))
    assert tally.write(tmp_path / "a" / "w1.json", good.to_json())
    (tmp_path / "a" / "w2.json").write_bytes(good.to_json()[:-9])
    (tmp_path / "a" / "barred.json").write_text('{"salt": "", "reason": ""}')
    (found,) = tally.together((tmp_path / "a").glob("*.json"))
    assert (found.tally.requests, found.tally.cases, found.since) == (3, (3, 1), 5.0)


def test_the_report_lists_what_runs_and_what_ran(tmp_path) -> None:
    """Other tolerances are another question: their evidence is apart."""
    strict = Pairing("m", "9", 9, 7, Shadow(to=9, compare={"y": Tolerance(atol=0.1)}))
    kept = Kept(strict, 5.0, tally=Tally(requests=50, single=[50, 50]))
    tally.write(tally.directory(tmp_path, "m", strict.key) / "w.json", kept.to_json())
    state = ModelState(follow=False, aliases={"champion": 7}, route=Route(shadow=(Shadow(to=9),)))

    now, before = report.report(tmp_path, "m", state)

    assert (now["running"], now["verdict"], now["disagreement"]["n"]) == (True, "inconclusive", 0)
    assert (before["running"], before["verdict"]) == (False, "breach")
    assert report.cases_of(tmp_path, strict)[0]["differ"] == 50


# -- copies


class Queue:
    """Of the champion."""

    is_behind = False


class Twin:
    """Adds a number; may be told to wait, or to fail."""

    def __init__(self):
        self.number = 0.0
        self.error = None
        self.gate = threading.Event()
        self.gate.set()
        self.stopped = False

    def run(self, arrays):
        self.gate.wait(10)
        if self.stopped or self.error:
            raise ModelFailedError(self.error or "ended")
        return [arrays[0] + np.float32(self.number)]

    def stop(self):
        self.stopped = True
        self.gate.set()


class Rig:
    """One champion, one shadow, and what they count."""

    def __init__(self, tmp_path, *, predictions=None, places=lambda: None, pacer=None, **settings):
        self.telemetry, self.twin, self.queue = Telemetry(), Twin(), Queue()
        self.observed = []
        self.pacer = pacer or Pacer(lambda: (0, 0))
        self.champion, self.shadow = (self.variant(version) for version in (7, 9))
        self.copier = Copier(
            pairing(**settings),
            self.champion,
            self.shadow,
            salt=bytes(16),
            rows_max=64,
            file=tmp_path / "m" / "w.json",
            slot=tmp_path / "slot",
            telemetry=self.telemetry,
            meters=Meters(self.telemetry, "m", 9, "9", "shadow"),
            observe=lambda: True,
            places=places,
            pacer=self.pacer,
            predictions=predictions,
        )
        self.copies = Copies(self.champion, [self.copier], predictions)

    def variant(self, version):
        return Variant(
            served=Served("m", version, SIGNATURE, b""),
            queue=self.queue,
            observe=lambda *ran: self.observed.append(ran),
            meters=Meters(self.telemetry, "m", version, "champion", "primary"),
            about={},
            work=None,
            can_batch=True,
            twin=lambda: self.twin,
        )

    def ask(self, unit=b"u", rows=1, variant=None, traffic="primary"):
        x = np.zeros((rows, 1), np.float32)
        choice = Choice.of("champion", 7, "DEFAULT", 1, traffic=traffic)
        decision = Decision(choice, None, "header:x-user-id", unit)
        self.copies.offer(variant or self.champion, decision, b"", [x], [x], rows)

    async def settled(self, n):
        until = time.monotonic() + 10
        while self.copier.kept.coverage.sampled < n or self.copier.n_waiting:
            assert time.monotonic() < until
            await asyncio.sleep(0.005)
        await asyncio.sleep(0)  # what the thread has called back

    def dropped(self, reason):
        return self.telemetry.counter(SHADOW_DROPPED, "m", "9", reason).value

    def pairs(self, what):
        return self.telemetry.counter(SHADOW_PAIRS, "m", "9", what).value


def test_copies_are_run_compared_and_shown_to_the_shadows_own_monitors(tmp_path) -> None:
    """Everything that the champion answered; not calls by number, not what others answered."""

    async def check():
        rig = Rig(tmp_path, inflight_max=100)
        for k in range(20):
            rig.ask(f"u{k}".encode(), rows=2)
        rig.ask(traffic="pinned")
        rig.ask(traffic="fallback")
        rig.ask(variant=rig.shadow)
        await rig.settled(20)
        rig.twin.number = 1.0
        for k in range(10):
            rig.ask(f"v{k}".encode())
        await rig.settled(30)
        rig.copier.close()
        await asyncio.to_thread(rig.copier.join, 5)
        rig.copier.flush()
        assert (rig.pairs("agree"), rig.pairs("differ"), rig.pairs("failed")) == (20, 10, 0)
        assert sum(rows for _, _, rows in rig.observed) == 50
        kept = tally.read(tmp_path / "m" / "w.json")
        assert kept.tally.cases == (30, 10)
        assert kept.coverage.sampled == 30
        assert kept.coverage.dropped == {}

    asyncio.run(check())


def test_a_shadow_that_fails_differs_on_all_its_rows(tmp_path) -> None:
    """The copies of a batch fail one by one."""

    async def check():
        rig = Rig(tmp_path, inflight_max=100)
        rig.twin.error = "no"
        for k in range(5):
            rig.ask(f"u{k}".encode(), rows=3)
        await rig.settled(5)
        counts = rig.copier.kept.tally
        assert (counts.failed, counts.rows_differ, counts.cases) == (5, 15, (5, 5))
        assert rig.pairs("failed") == 5
        rig.copier.close()

    asyncio.run(check())


def test_no_room_no_copy_and_every_drop_has_a_reason(tmp_path) -> None:
    """In number, in bytes, while the champion is behind, after the deadline, while stuck."""

    async def check():
        rig = Rig(tmp_path, inflight_max=2, bytes_max=64, deadline_s=0.3)
        rig.twin.gate.clear()
        rig.ask(b"a")
        rig.ask(b"b", rows=100)
        rig.ask(b"c")
        rig.ask(b"d")
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        assert (rig.dropped("bytes_max"), rig.dropped("inflight_max")) == (1, 1)
        all_are_late = time.monotonic() + 0.3
        rig.queue.is_behind = True
        rig.ask(b"e")
        await asyncio.sleep(0)
        assert rig.dropped("champion_busy") == 1
        rig.queue.is_behind = False
        until = time.monotonic() + 10
        while not rig.twin.stopped:
            assert time.monotonic() < until
            if time.monotonic() > all_are_late:
                rig.copier.tick(time.monotonic())
            await asyncio.sleep(0.01)
        await rig.settled(5)
        assert rig.dropped("deadline_exceeded") == 2
        assert sum(rig.copier.kept.coverage.dropped.values()) == 5
        assert rig.copier.kept.tally.requests == 0
        rig.copier.close()

    asyncio.run(check())


@pytest.mark.parametrize("keeps_up", [True, False])
def test_a_shadow_that_cannot_keep_up_rests_while_answers_have_waited_for_it(
    tmp_path, monkeypatch, keeps_up
) -> None:
    """Two seconds at a time; one that keeps up goes on, for drops would leave it unjudged."""

    async def check():
        waited, ended = 0, []
        rig = Rig(tmp_path, deadline_s=9, pacer=Pacer(lambda: (waited, 0)))
        run = rig.twin.run
        monkeypatch.setattr(Demand, "ran", lambda *_, **__: 0.99 if keeps_up else 1.01)

        def slow(arrays):
            nonlocal waited
            waited += OWED_NS_MAX
            ended.append(time.monotonic())
            return run(arrays)

        rig.twin.run = slow
        rig.ask(b"a")
        await rig.settled(1)
        rig.ask(b"b")
        rig.ask(b"c")
        await rig.settled(3)
        assert (ended[1] - ended[0] < 2) == keeps_up
        assert rig.pairs("agree") == 3
        rig.copier.close()

    asyncio.run(check())


def test_a_run_that_does_not_end_stops_copies_until_it_does(tmp_path, monkeypatch) -> None:
    """A long operator cannot be ended: nothing queues behind it meanwhile."""

    async def check():
        rig = Rig(tmp_path, deadline_s=0.05)
        monkeypatch.setattr(rig.twin, "stop", lambda: None)
        rig.twin.gate.clear()
        rig.ask(b"a")
        until = time.monotonic() + 10
        while not rig.dropped("stuck"):
            assert time.monotonic() < until
            rig.copier.tick(time.monotonic())
            rig.copier.tick(time.monotonic() + 10)
            rig.ask(b"b")
            await asyncio.sleep(0.01)
        rig.twin.gate.set()
        while not rig.pairs("agree"):
            assert time.monotonic() < until
            rig.copier.tick(time.monotonic())
            rig.ask(b"c")
            await asyncio.sleep(0.01)
        rig.copier.close()

    asyncio.run(check())


def test_samples_are_shares_and_two_shadows_are_drawn_independently() -> None:
    """10 % of units for one and 10 % for another: 1 % are in both."""
    keys = [key_of(to, bytes(16)) for to in ("9", "10")]
    units = [f"u{k}".encode() for k in range(20_000)]
    both = [[bucket_of_bytes(key, unit) < 1000 for unit in units] for key in keys]
    assert all(abs(sum(each) - 2000) < 200 for each in both)
    assert abs(sum(map(all, zip(*both, strict=True))) - 200) < 60


def test_a_shadow_of_other_inputs_is_not_asked_and_says_why(tmp_path) -> None:
    """It could not be asked the same."""

    async def check():
        rig = Rig(tmp_path)
        other = Signature((TensorSpec("x", "FP64", (-1, 1)),), SIGNATURE.outputs)
        copier = Copier(
            pairing(), rig.champion, Variant(**{
                name: getattr(rig.shadow, name)
                for name in ("queue", "observe", "meters", "about", "work", "can_batch", "twin")
            }, served=Served("m", 9, other, b"")),
            salt=bytes(16), rows_max=64, file=tmp_path / "o.json", slot=tmp_path / "s",
            telemetry=rig.telemetry, meters=rig.shadow.meters, observe=lambda: True,
            places=lambda: None, pacer=rig.pacer, predictions=None,
        )  # fmt: skip
        assert copier.kept.problem == "its input 'x' is FP64, and was FP32"

    asyncio.run(check())
