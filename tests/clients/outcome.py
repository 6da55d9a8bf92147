"""How a suite says that it could not run at all."""


class SkippedError(Exception):
    """A client cannot run here; the text says why."""
