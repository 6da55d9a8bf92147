"""Waiting for a condition, never for a time."""

import time


def wait_until(condition, what, timeout_s=10.0):
    """The first true value of `condition()`, asked again and again until the deadline."""
    until = time.monotonic() + timeout_s
    while not (value := condition()):
        assert time.monotonic() < until, f"after {timeout_s} s still not: {what}"
        time.sleep(0.02)
    return value
