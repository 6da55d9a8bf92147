"""Which channel of a profile stands for which element of a model's tensors.

A tensor of one element a row is the channel `input:NAME` (or `output:NAME`); a matrix is
`input:NAME[0]`, `input:NAME[1]`, ...
"""

from dataclasses import dataclass, replace
from pathlib import Path

import orjson

from monitors import Profile
from registry.signature import Signature, TensorSpec

WIDTH_MAX = 4096
"""Columns of one matrix that are watched one by one."""


@dataclass(frozen=True, slots=True)
class Column:
    """Where one channel's values are found in an observation."""

    channel: str
    is_output: bool
    tensor: int
    position: int
    """Among the elements of a row."""
    is_alone: bool = False
    """Its tensor has one element a row."""


def columns_of(signature: Signature) -> tuple[list[Column], list[str]]:
    """Everything of a model that can be watched, and what cannot, with the reason."""
    columns: list[Column] = []
    problems: list[str] = []
    for role, specs in (("input", signature.inputs), ("output", signature.outputs)):
        for k, spec in enumerate(specs):
            width = _width(spec)
            if width is None:
                problems.append(
                    f"{role} {spec.name!r} is not watched: its shape {list(spec.shape)} has no"
                    " fixed number of columns"
                )
                continue
            is_output = role == "output"
            if width == 1:
                columns.append(Column(f"{role}:{spec.name}", is_output, k, 0, is_alone=True))
            else:
                columns += [
                    Column(f"{role}:{spec.name}[{j}]", is_output, k, j) for j in range(width)
                ]
    return columns, problems


def _width(spec: TensorSpec) -> int | None:
    """Elements in one row, when that is fixed and the tensor is a column or a matrix."""
    if len(spec.shape) == 1:
        return 1
    if len(spec.shape) == 2 and 0 < spec.shape[1] <= WIDTH_MAX:
        return spec.shape[1]
    return None


def fit(
    profile: Profile, columns: list[Column], signature: Signature
) -> tuple[list[Column], list[str]]:
    """The columns that a profile can judge, and a sentence for each that it cannot.

    A one-column tensor may also be named with its position, `input:x[0]`.
    """
    problems: list[str] = []
    fitting: list[Column] = []
    known = {column.channel: column for column in columns}
    known |= {f"{column.channel}[0]": column for column in columns if column.is_alone}
    for name, channel in profile.channels.items():
        if (column := known.get(name)) is None:
            problems.append(f"reference column {name!r} is no input or output of the model")
            continue
        specs = signature.outputs if column.is_output else signature.inputs
        is_text = specs[column.tensor].datatype == "BYTES"
        if is_text != (channel.kind == "categorical"):
            problems.append(
                f"reference column {name!r} is {channel.kind}, the model's is"
                f" {specs[column.tensor].datatype}: not watched"
            )
            continue
        fitting.append(Column(name, column.is_output, column.tensor, column.position))
    covered = {(c.is_output, c.tensor, c.position) for c in fitting}
    problems += [
        f"{column.channel!r} has no column in the reference: not watched"
        for column in columns
        if (column.is_output, column.tensor, column.position) not in covered
        and column.channel not in profile.channels
    ]
    return fitting, problems


NAMES = "columns"
"""Where a profile's lineage keeps the names of a matrix's columns."""


def named(signature: Signature, reference: Path) -> Signature:
    """The signature, its one matrix with the column names of a reference file, if that has some.

    What is wrong with the file is said where it is read as a profile.
    """
    specs = signature.inputs
    if len(specs) != 1 or len(specs[0].shape) != 2:
        return signature
    try:
        found = orjson.loads(reference.read_bytes())["lineage"][NAMES]
    except (OSError, ValueError, KeyError, TypeError):
        return signature
    if type(found) is not list or any(type(name) is not str for name in found):
        return signature
    if len(set(found)) < len(found) or specs[0].shape[1] not in (-1, len(found)):
        return signature
    return replace(signature, inputs=(replace(specs[0], columns=tuple(found)),))
