"""The grammar of model and version names, for every entry point.

`str.isdigit` and `int` take far more than a version may be (other scripts' digits, signs, spaces,
underscores, leading zeros), so both names are matched in ASCII, and never joined to a path
unchecked.
"""

import re

_MODEL = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}", re.ASCII)
_VERSION = re.compile(r"[1-9][0-9]{0,17}", re.ASCII)


def is_model(name: str) -> bool:
    """Whether `name` may name a model: 1 to 128 of letters, digits, `.`, `_`, `-`, without `..`."""
    return _MODEL.fullmatch(name) is not None and ".." not in name


def version(text: str) -> int | None:
    """The version that `text` names: a positive integer of up to 18 digits, else None."""
    return int(text) if _VERSION.fullmatch(text) else None


def is_file(name: str) -> bool:
    """Whether `name` may name a file of a version: printable, no path, no leading dot.

    Exporters name files of weights after tensors (`onnx::MatMul_12`), so more than a model's
    letters is allowed.
    """
    return (
        0 < len(name.encode("utf-8", "surrogateescape")) <= 255
        and name.isprintable()
        and not name.startswith(".")
        and "/" not in name
        and "\\" not in name
    )
