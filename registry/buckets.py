"""Units to buckets, buckets to variants: who answers whom is a pure function of unit and revision.

A unit is hashed into one of 10 000 buckets, with a salt of its own for each purpose, so that who
is split, who is shadowed and who is captured are independent of each other. A table says which
variant has which bucket. When weights change, as few buckets as possible change hands.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from hashlib import blake2b

from registry.errors import RegistryError

N = 10_000
"""Buckets: one is a hundredth of a percent."""
SALT_BYTES = 16
_VARIANTS_MAX = 255


class BucketsError(RegistryError):
    """A bucket table that cannot be: a range out of place, a sum that is not 10 000."""


def bucket_of(salt: bytes, unit: str) -> int:
    """The bucket of a unit.

    Parameters
    ----------
    salt : 16 bytes; another salt is another, independent, assignment
    unit : what is sticky, as text: a header's value without spaces around it, an integer in decimal

    Notes
    -----
    The first 8 bytes of BLAKE2b of the unit in UTF-8, keyed with the salt, as a big-endian number,
    modulo 10 000: uneven by less than one part in 10^15.

    >>> bucket_of(bytes(range(16)), "user-1")
    9196
    """
    # A JSON text may hold half a surrogate pair: it hashes all the same.
    return bucket_of_bytes(salt, unit.encode("utf-8", "surrogatepass"))


def bucket_of_bytes(salt: bytes, unit: bytes) -> int:
    """The same for the value of a header, which may be in any bytes."""
    return int.from_bytes(blake2b(unit, digest_size=8, key=salt).digest()) % N


@dataclass(frozen=True, slots=True)
class Buckets:
    """Which variant has which bucket. Variants are named by what a route's `to` says."""

    names: tuple[str, ...]
    owners: bytes
    """(10_000,) the index in `names` of each bucket's variant."""

    @classmethod
    def all_to(cls, name: str) -> "Buckets":
        """Every bucket to one variant."""
        return cls((name,), bytes(N))

    @classmethod
    def parse(cls, text: str) -> "Buckets":
        """A table as `format` writes it: `0-499:challenger,500-9999:champion`.

        Raises
        ------
        BucketsError : the ranges do not follow each other from 0 to 9999.
        """
        indices: dict[str, int] = {}
        owners = bytearray()
        for part in text.split(","):
            span, colon, name = part.partition(":")
            low, dash, high = span.partition("-")
            numbers = low, high if dash else low
            if not (colon and name and all(n.isascii() and n.isdigit() for n in numbers)):
                raise BucketsError(f"buckets: {part[:80]!r} is no range such as 0-499:challenger")
            first, last = int(numbers[0][:9]), int(numbers[1][:9])
            if first != len(owners) or not first <= last < N:
                raise BucketsError(
                    f"buckets: {part[:80]!r} must start at {len(owners)} and end by {N - 1}"
                )
            index = indices.setdefault(name, len(indices))
            if index >= _VARIANTS_MAX:
                raise BucketsError(f"buckets: more than {_VARIANTS_MAX} variants")
            owners += bytes((index,)) * (last + 1 - first)
        if len(owners) != N:
            raise BucketsError(f"buckets: they end at {len(owners) - 1}, not at {N - 1}")
        return cls(tuple(indices), bytes(owners))

    def format(self) -> str:
        """The table as ranges, ascending."""
        owners, ranges, first = self.owners, [], 0
        for k in range(1, N + 1):
            if k == N or owners[k] != owners[first]:
                span = f"{first}-{k - 1}" if k - 1 > first else f"{first}"
                ranges.append(f"{span}:{self.names[owners[first]]}")
                first = k
        return ",".join(ranges)

    def owner(self, bucket: int) -> str:
        """The variant that has a bucket."""
        return self.names[self.owners[bucket]]

    def weights(self) -> dict[str, int]:
        """Buckets of each variant that has any."""
        counts = [self.owners.count(index) for index in range(len(self.names))]
        return {name: n for name, n in zip(self.names, counts, strict=True) if n}

    def moved_to(self, weights: Mapping[str, int], seed: bytes, base: str = "") -> "Buckets":
        """The table for new weights that moves as few buckets as possible.

        Parameters
        ----------
        weights : buckets of each variant; they add up to 10 000
        seed : fixes the order in which buckets change hands; keep it for the life of a rollout
        base : the variant that others grow from and shrink to; by default the first in `weights`

        Notes
        -----
        Buckets have a fixed order of rank, a rotation by the seed: the hash has mixed the units,
        and whole ranges keep tables short enough to read. The base gives its lowest-ranked buckets
        and everybody else gives their highest-ranked ones back, so that 5 -> 20 -> 5 percent ends
        where it began, and nobody who was moved in by a ramp is moved out by it.

        Raises
        ------
        BucketsError : the weights do not add up to 10 000, or one is negative.
        """
        total = sum(weights.values())
        if total != N or min(weights.values()) < 0:
            raise BucketsError(f"weights add up to {total} buckets, not to {N}")
        if len(weights) > _VARIANTS_MAX:
            raise BucketsError(f"more than {_VARIANTS_MAX} variants")
        base = base or next(iter(weights))
        start = int.from_bytes(blake2b(seed, digest_size=8).digest()) % N
        held: dict[str, list[int]] = {name: [] for name in (*weights, *self.names)}
        for rank in range(N):  # ascending by rank, within each variant
            bucket = (start + rank) % N
            held[self.names[self.owners[bucket]]].append(rank)
        free: list[int] = []
        for name, ranks in held.items():
            if (surplus := len(ranks) - weights.get(name, 0)) > 0:
                given = ranks[:surplus] if name == base else ranks[-surplus:]
                held[name] = ranks[surplus:] if name == base else ranks[:-surplus]
                free += given
        free.sort()
        for name in sorted(weights, key=lambda name: name == base):  # the base takes what is left
            if (missing := weights[name] - len(held[name])) > 0:
                held[name] += free[:missing]
                del free[:missing]
        owners = bytearray(N)
        for index, name in enumerate(weights):
            for rank in held[name]:
                owners[(start + rank) % N] = index
        return Buckets(tuple(weights), bytes(owners))


def moved(before: Buckets, after: Buckets) -> dict[tuple[str, str], int]:
    """How many buckets went from one variant to another."""
    counts: dict[tuple[str, str], int] = {}
    for bucket in range(N):
        pair = before.owner(bucket), after.owner(bucket)
        if pair[0] != pair[1]:
            counts[pair] = counts.get(pair, 0) + 1
    return counts
