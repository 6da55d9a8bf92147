"""The listener's ticks: seldom, in the tenths of a second that uvicorn counts, and at once."""

import asyncio
import time

import pytest
from starlette.applications import Starlette

from gateway.config import ServerConfig
from gateway.listener import Listener


class Counted(Listener):
    """Notes its ticks, and ends after so many."""

    n_ticks = 3

    def __init__(self, config: ServerConfig) -> None:
        super().__init__(Starlette(), config)
        self.seen: list[int] = []

    async def on_tick(self, counter: int) -> bool:
        self.seen.append(counter)
        return self.should_exit or len(self.seen) == self.n_ticks


@pytest.fixture
def listener(tmp_path) -> Counted:
    return Counted(ServerConfig(registry=str(tmp_path)))


@pytest.mark.parametrize("ticks", [1, 2, 5])
def test_ticks_count_tenths_of_a_second(listener: Counted, ticks: int) -> None:
    """Whatever is due each second by uvicorn's count is met: ten is a multiple of the steps."""
    listener.ticks = ticks
    start = time.monotonic()
    asyncio.run(listener.main_loop())

    assert listener.seen == [0, ticks, 2 * ticks]
    assert time.monotonic() - start >= 2 * ticks / 10


def test_who_is_told_to_end_does_not_wait_for_the_next_tick(listener: Counted) -> None:
    """Also when told before the first rest, and twice."""

    async def scenario() -> list[int]:
        listener.ticks, listener.n_ticks = 10_000, 9
        asyncio.get_running_loop().call_later(0.05, listener.told, 15, None)
        asyncio.get_running_loop().call_later(0.05, listener.told, 15, None)
        await asyncio.wait_for(listener.main_loop(), 10)
        return listener.seen

    assert asyncio.run(scenario()) == [0, 10_000]
    listener.seen.clear()
    asyncio.run(asyncio.wait_for(listener.main_loop(), 10))
    assert listener.seen == [0]
