"""Every way the monitors can refuse, with a stable code and a sentence; no HTTP status here.

MonitorError
|-- ProfileError        a reference profile that cannot be fitted or read
|-- BinMismatchError    histograms that do not belong to the same bins
|-- ProfileMismatchError   counts of two different profiles
`-- BlockError          a block of rows whose columns do not fit together, or a bad setting
"""


class MonitorError(Exception):
    """Any refusal of the monitors; catch this one to catch them all."""

    code = "monitor_error"


class ProfileError(MonitorError):
    """A reference profile cannot be fitted from these columns, or read from this text."""

    code = "profile_invalid"

    def __init__(
        self, problem: str, *, channel: str | None = None, field: str | None = None
    ) -> None:
        self.channel = channel
        self.field = field
        place = ": ".join(
            part
            for part in (
                None if channel is None else f"channel {_short(channel)}",
                None if field is None else f"field {_short(field)}",
            )
            if part is not None
        )
        super().__init__(f"reference profile: {place + ': ' if place else ''}{problem}")


class BinMismatchError(MonitorError):
    """Two histograms do not have the same bins, or one of them holds no rows."""

    code = "bin_mismatch"


class ProfileMismatchError(MonitorError):
    """Counts can only be added when they were counted with the same profile."""

    code = "profile_mismatch"

    def __init__(self, digest: str, other: str) -> None:
        super().__init__(
            f"counts of profile {digest[:12]} and of profile {other[:12]} do not add up;"
            " count both with the same reference profile"
        )


class BlockError(MonitorError):
    """A block of rows cannot be counted as it is."""

    code = "block_invalid"


def _short(text: str, length_max: int = 80) -> str:
    """Quote a name that may come from outside, at a length fit for a log line."""
    return repr(text if len(text) <= length_max else text[:length_max] + "...")
