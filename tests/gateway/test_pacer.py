"""What answers may wait on account of shadows, and that the kernel's counts are what they are."""

import os
import subprocess
import sys
import threading
import time
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.shadow.pacer import (
    ALLOWED_NS,
    ALLOWED_SHARE,
    OWED_NS_MAX,
    SAVED_NS,
    Demand,
    Pacer,
    Turns,
    give_way,
)

MS = 1_000_000


class World:
    """A thread that answers, and a clock."""

    def __init__(self):
        self.at = self.waited = self.turns = 0
        self.pacer = Pacer(lambda: (self.waited, self.turns), lambda: self.at)

    def passes(self, ns, *, turns=0, waited=0):
        self.at += ns
        self.turns += turns
        self.waited += waited


def test_a_shadow_that_takes_no_core_away_never_rests() -> None:
    """Waits within what is allowed are nobody's fault."""
    world = World()
    for _ in range(1000):
        with world.pacer.run():
            world.passes(5 * MS, turns=3, waited=3 * ALLOWED_NS)
        assert not world.pacer.is_owing


def test_waits_while_no_shadow_runs_are_not_charged() -> None:
    """Strangers that compute are the machine's, not the shadow's."""
    world = World()
    for _ in range(100):
        world.passes(5 * MS, turns=3, waited=4 * MS)
        assert not world.pacer.is_owing


def test_on_a_busy_machine_only_what_is_beyond_the_usual_wait_is_charged() -> None:
    """Each turn waits 0.4 ms for strangers; with the shadow 0.1 ms more, which it must pay for."""
    world = World()
    for _ in range(1000):
        world.passes(5 * MS, turns=3, waited=3 * 400_000)
        assert not world.pacer.is_owing
        with world.pacer.run():
            world.passes(5 * MS, turns=3, waited=3 * 400_000)
        assert not world.pacer.is_owing
    n_runs = 0
    for _ in range(20_000):
        world.passes(5 * MS, turns=3, waited=3 * 400_000)
        if not world.pacer.is_owing:
            n_runs += 1
            with world.pacer.run():
                world.passes(5 * MS, turns=3, waited=3 * 500_000)
    # Each costs 0.3 ms; 30 us and 5 us are allowed in a run and the time beside it.
    pays = 3 * ALLOWED_NS + 5 * MS * ALLOWED_SHARE
    assert n_runs == pytest.approx(20_000 * pays / (300_000 - pays), rel=0.1)


@given(
    st.lists(
        st.tuples(
            st.integers(0, 6 * MS),  # waited in a run
            st.integers(1, 50 * MS),  # how long it took
            st.integers(0, 50),  # turns in it
            st.integers(1, 50 * MS),  # and until it is looked at again
            st.integers(0, 50),
        ),
        max_size=200,
    )
)
def test_who_rests_as_told_makes_answers_wait_no_longer_than_allowed(story) -> None:
    """All waits in runs are within turns and time, but for what is saved and what one run costs."""
    world, charged, worst = World(), 0, 0
    for waited, ran, turns, idle, idle_turns in story:
        if not world.pacer.is_owing:
            with world.pacer.run():
                world.passes(ran, turns=turns, waited=waited)
            charged, worst = charged + waited, max(worst, waited)
        world.passes(idle, turns=idle_turns)
    allowed = world.turns * ALLOWED_NS + world.at * ALLOWED_SHARE
    assert charged <= allowed + SAVED_NS + worst


def test_two_shadows_share_one_allowance() -> None:
    """What answers wait while both run is charged once; it counts while any of them runs."""
    world = World()
    with ExitStack() as both:
        both.enter_context(world.pacer.run())
        with world.pacer.run():
            world.passes(MS, waited=MS)
        world.passes(MS, waited=MS)
        assert world.pacer.is_owing
    owed = 2 * MS - 2 * MS * ALLOWED_SHARE
    turns = int(owed / ALLOWED_NS)
    world.passes(0, turns=turns - 1)
    assert world.pacer.is_owing
    world.passes(0, turns=2)
    assert not world.pacer.is_owing


def test_a_thread_with_nothing_to_do_forgives_in_time() -> None:
    """However long it waited, and though it takes no turn."""
    world = World()
    with world.pacer.run():
        world.passes(MS, waited=3600 * 1000 * MS)
    world.passes(int(OWED_NS_MAX / ALLOWED_SHARE) - MS)
    assert world.pacer.is_owing
    world.passes(2 * MS)
    assert not world.pacer.is_owing


@pytest.mark.parametrize("per_s", [20, 100, 600])
def test_demand_is_what_is_offered_times_what_one_takes(per_s) -> None:
    """After an idle hour as well, within seconds; and it falls as fast."""
    random, demand, now, n = np.random.default_rng(per_s), Demand(0.0), 3600.0, 0

    def shares(per_s, seconds):
        nonlocal now, n
        found, until = [], now + seconds
        while now < until:
            now += (passed := 0.01 + random.exponential(0.02))
            n += int(random.poisson(per_s * passed))
            found.append(demand.ran(2, 0.04, n_offered=n, now=now))
        return found

    assert np.mean(shares(per_s, 62)[-1000:]) == pytest.approx(per_s * 0.02, rel=0.1)
    assert np.mean(shares(5, 62)[-1000:]) == pytest.approx(0.1, rel=0.2)
    assert max(shares(per_s, 3)[-20:]) > per_s * 0.01


def test_the_kernel_counts_what_a_thread_waits() -> None:
    """A thread on a core that somebody else computes on waits; the counts say so, and stop."""
    if not Path("/proc/self/schedstat").exists():
        pytest.skip("this kernel counts no waits")
    core = max(os.sched_getaffinity(0))
    found = {}

    def work():
        os.sched_setaffinity(0, {core})
        turns = Turns(threading.get_native_id())
        before, start, end = turns(), time.perf_counter(), time.thread_time() + 0.2
        while time.thread_time() < end:
            pass
        lost_s = time.perf_counter() - start - 0.2
        found["waited_s"], found["lost_s"] = (turns()[0] - before[0]) / 1e9, lost_s
        found["turns"] = turns()[1] - before[1]
        turns.close()
        found["after"] = turns() == turns()

    with subprocess.Popen(
        [
            sys.executable, "-c",
            f"import os; os.sched_setaffinity(0, {{{core}}}); print(flush=True)\nwhile True: pass",
        ],
        stdout=subprocess.PIPE,
    ) as stranger:  # fmt: skip
        assert stranger.stdout is not None
        stranger.stdout.readline()
        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
        stranger.kill()
    assert found["waited_s"] > 0.02
    assert found["waited_s"] <= found["lost_s"] + 0.02
    assert found["turns"] >= 1
    assert found["after"]


def test_no_counts_are_no_waits() -> None:
    """Of a thread that is not, or a kernel that does not count."""
    assert Turns(2**22 + 1)() == (0, 0)


def test_a_thread_that_gives_way_keeps_its_share_and_takes_no_core_away() -> None:
    """By what the kernel says of it: SCHED_BATCH, and the niceness that it had."""
    found = {}

    def work():
        give_way()
        found["policy"] = os.sched_getscheduler(0)
        found["nice"] = os.getpriority(os.PRIO_PROCESS, 0)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert found["policy"] == os.SCHED_BATCH
    assert found["nice"] == os.getpriority(os.PRIO_PROCESS, 0)
    assert os.sched_getscheduler(0) == os.SCHED_OTHER
