"""Good messages with some bytes changed."""

import random
from collections.abc import Sequence


def mutated(good: bytes, draw: random.Random, marks: Sequence[bytes]) -> bytes:
    """A body with one to four places changed: a mark put in, bytes cut, doubled or made up."""
    body = bytearray(good)
    for _ in range(draw.randint(1, 4)):
        at, length = draw.randrange(len(body) + 1), draw.choice([0, 1, 1, 2, 5, 30])
        match draw.randrange(4):
            case 0:
                body[at : at + length] = draw.choice(marks)
            case 1:
                del body[at : at + length]
            case 2:
                body[at:at] = body[at : at + length]
            case _:
                body[at : at + 1] = draw.randbytes(1)
    return bytes(body)
