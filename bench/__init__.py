"""One question about driftgate's speed per module, each answered with one printed line."""


class BenchError(Exception):
    """A question could not be answered; the sentence says why."""
