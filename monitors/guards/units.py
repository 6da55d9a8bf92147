"""Units that have been counted, each once: a bounded set of hashes that adds up by union.

When it is full, the threshold is halved: units with a hash at or above it are neither remembered
nor counted from then on. What was counted before stays counted. Which units those are depends on
their hash alone, so it favours no variant.
"""

import base64
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

_ALL = 1 << 64


class Units:
    """Hashes below an adaptive threshold, each with the code it was first seen with."""

    __slots__ = ("_codes", "_units_max", "threshold")

    def __init__(self, units_max: int = 4096, threshold: int = _ALL) -> None:
        self._units_max = units_max
        self.threshold = threshold
        self._codes: dict[int, bytes] = {}

    def add(self, unit: int, code: bytes) -> bool:
        """Remember a unit; whether it is new and to be counted.

        Parameters
        ----------
        unit : a hash of 64 bits, not the one that assigns variants
        code : what is to be known of its first time, always of the same length
        """
        if unit >= self.threshold or unit in self._codes:
            return False
        self._codes[unit] = code
        if len(self._codes) > self._units_max:
            self.threshold //= 2
            self._codes = {u: c for u, c in self._codes.items() if u < self.threshold}
        return True

    def __len__(self) -> int:
        return len(self._codes)

    def __contains__(self, unit: int) -> bool:
        return unit in self._codes

    def __iter__(self) -> Iterator[tuple[int, bytes]]:
        """Units with their codes, in the order in which they came."""
        return iter(self._codes.items())

    def to_dict(self) -> dict[str, Any]:
        """As plain values, for JSON."""
        hashes = np.fromiter(self._codes, np.uint64, len(self._codes))
        return {
            "units_max": self._units_max,
            "threshold": str(self.threshold),
            "hashes": base64.b64encode(hashes.astype("<u8").tobytes()).decode(),
            "codes": base64.b64encode(b"".join(self._codes.values())).decode(),
        }

    @classmethod
    def from_dict(cls, plain: Mapping[str, Any]) -> "Units":
        """What `to_dict` gave; ValueError, KeyError or TypeError when it is something else."""
        units = cls(int(plain["units_max"]), int(plain["threshold"]))
        hashes = np.frombuffer(base64.b64decode(plain["hashes"]), "<u8").tolist()
        codes = base64.b64decode(plain["codes"])
        width = len(codes) // len(hashes) if hashes else 0
        if len(codes) != width * len(hashes):
            raise ValueError("codes of units are cut")
        units._codes = {
            unit: codes[at * width : (at + 1) * width] for at, unit in enumerate(hashes)
        }
        return units
