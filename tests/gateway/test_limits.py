"""What one model may take of a worker."""

import pytest

from gateway.errors import ModelBusyError, TooLargeError
from gateway.limits import Gate, refuse_rows
from registry.routes import Limits


def test_as_many_requests_are_let_in_as_may_be_under_way() -> None:
    """One more is refused, until one has left; the number of another revision counts at once."""
    gate = Gate("m")
    for _ in range(2):
        gate.enter(Limits(inflight_max=2))
    with pytest.raises(ModelBusyError):
        gate.enter(Limits(inflight_max=2))
    gate.leave()
    gate.enter(Limits(inflight_max=2))
    gate.enter(Limits())
    assert gate.inflight == 3


def test_rows_beyond_the_route_are_refused_with_both_numbers() -> None:
    """Without a number in the route there is none."""
    refuse_rows("m", 8, 8)
    refuse_rows("m", 10_000, None)
    with pytest.raises(TooLargeError, match=r"9 rows.*allows 8"):
        refuse_rows("m", 9, 8)
