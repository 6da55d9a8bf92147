"""The thread that answers is given a core soon, and nobody else is treated otherwise."""

import os
import re
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from gateway.scheduling import SLICE_NS, take_short_turns
from tests import models
from tests.serving import serve


def slice_of(thread: Path) -> int:
    """Nanoseconds, as the kernel says."""
    try:
        told = re.search(r"^se\.slice\s*:\s*(\d+)", (thread / "sched").read_text(), re.MULTILINE)
    except OSError:
        told = None
    if told is None:
        pytest.skip("this kernel does not tell the slice of a thread")
    return int(told[1])


def own_slice() -> int:
    return slice_of(Path(f"/proc/self/task/{threading.get_native_id()}"))


def apart(work: Callable[[], int]) -> int:
    """What comes of it in a thread of its own: nobody else is left with what it asks for."""
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(work).result(10)


def test_a_thread_gets_the_slice_it_asks_for_and_passes_it_to_nobody() -> None:
    """As the kernel tells it; a thread that it starts has the one of all others."""
    usual = own_slice()

    def asked() -> int:
        nice = os.getpriority(os.PRIO_PROCESS, 0)
        assert take_short_turns()
        assert os.getpriority(os.PRIO_PROCESS, 0) == nice
        assert apart(own_slice) == usual
        return own_slice()

    found = apart(asked)
    assert own_slice() == usual
    if found == usual:
        pytest.skip("this kernel grants no slices")
    assert found == SLICE_NS < usual


@pytest.mark.parametrize("policy", [os.SCHED_BATCH, os.SCHED_IDLE])
def test_a_thread_of_another_policy_is_left_as_it_is(policy: int) -> None:
    """Somebody meant it."""

    def asked() -> int:
        os.sched_setscheduler(0, policy, os.sched_param(0))
        assert not take_short_turns()
        return os.sched_getscheduler(0)

    assert apart(asked) == policy


def test_where_nobody_may_ask_nothing_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    """A sandbox refuses the call: the server starts all the same."""

    def refused(_: int) -> int:
        raise PermissionError

    monkeypatch.setattr(os, "sched_getscheduler", refused)

    assert not take_short_turns()


def test_a_priority_is_kept() -> None:
    """A server that was started with `nice` stays below the others."""

    def asked() -> int:
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 5)
        assert take_short_turns()
        return os.getpriority(os.PRIO_PROCESS, 0)

    assert apart(asked) == 5


def test_the_thread_that_answers_asks(tmp_path: Path) -> None:
    """In every worker, its loop's and no other."""
    models.put(tmp_path, "m", 1, models.constant(1))
    usual = own_slice()
    with serve(tmp_path, flags=("--port", "0", "--workers", "2")) as server:
        pid = server.process.pid
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        slices = {
            task.name == child: slice_of(task)
            for child in children
            for task in Path(f"/proc/{child}/task").iterdir()
        }
        assert slice_of(Path(f"/proc/{pid}")) == usual
    assert len(children) == 2
    if slices[True] == usual:
        pytest.skip("this kernel grants no slices")
    assert slices == {True: SLICE_NS, False: usual}
