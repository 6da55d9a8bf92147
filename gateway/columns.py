"""Which channel of a profile stands for which element of a model's tensors.

A tensor of one element a row is the channel `input:NAME` (or `output:NAME`); a matrix is
`input:NAME[0]`, `input:NAME[1]`, ... An output that tells classes has channels that are made of it:
`output:NAME.class`, and `output:NAME.confidence` where it holds their probabilities.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
import orjson

from gateway.tensors import Array
from monitors import Profile, classes
from registry.signature import Signature, TensorSpec

WIDTH_MAX = 4096
"""Columns of one matrix that are watched one by one."""

_FLOATS = frozenset(("FP16", "BF16", "FP32", "FP64"))
_WHOLE = frozenset(f"{sign}INT{bits}" for sign in ("", "U") for bits in (8, 16, 32, 64))


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
    made: Literal["", "class", "confidence"] = ""
    """What it is of the whole row of its tensor, when it is no element of it."""


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


def answers_of(signature: Signature) -> list[Column]:
    """Classes and confidence of every output that could tell classes, by its datatype and width.

    Whether it does is seen from its values.
    """
    made: list[Column] = []
    for k, spec in enumerate(signature.outputs):
        width, name = _width(spec), f"output:{spec.name}"
        if width is not None and width > 1 and spec.datatype in _FLOATS:
            made.append(_made(f"{name}.{classes.CLASS}", k, "class"))
            made.append(_made(f"{name}.{classes.CONFIDENCE}", k, "confidence"))
        if width == 1 and spec.datatype in _WHOLE:
            made.append(replace(_made(f"{name}.{classes.CLASS}", k, "class"), is_alone=True))
    return made


def _made(channel: str, tensor: int, made: Literal["class", "confidence"]) -> Column:
    return Column(channel, is_output=True, tensor=tensor, position=0, made=made)


def answer(column: Column, rows: Array) -> Array:
    """(n_rows,) values of a column that is made of (n_rows, n) elements."""
    if column.is_alone:
        return classes.named(rows[:, 0])
    return classes.confidence(rows) if column.made == "confidence" else classes.classes(rows)


def with_answers(
    values: Mapping[str, Array], signature: Signature, wanted: Sequence[str] | None = None
) -> dict[str, Array]:
    """The values of a model's elements by channel, and those of the classes that they tell.

    Parameters
    ----------
    wanted : channels to make; None: of the outputs that tell classes, as their values show: rows of
        probabilities, and whole numbers beside such rows or under a name that says so
    """
    columns, _ = columns_of(signature)
    rows: dict[int, Array] = {}
    for k in range(len(signature.outputs)):
        parts = [values.get(c.channel) for c in columns if c.is_output and c.tensor == k]
        whole = [part for part in parts if part is not None]
        if whole and len(whole) == len(parts):
            rows[k] = np.stack(whole, axis=1)
    made = [c for c in answers_of(signature) if c.tensor in rows and c.channel not in values]
    if wanted is not None:
        chosen = [column for column in made if column.channel in wanted]
    else:
        chosen = [c for c in made if not c.is_alone and classes.are_probabilities(rows[c.tensor])]
        is_classifier = bool(chosen)
        chosen += [
            c
            for c in made
            if c.is_alone
            and classes.are_labels(rows[c.tensor][:, 0])
            and (is_classifier or _says_class(signature.outputs[c.tensor].name))
        ]
    return {**values, **{column.channel: answer(column, rows[column.tensor]) for column in chosen}}


def _says_class(name: str) -> bool:
    return any(word in name.lower() for word in ("label", "class"))


def fit(
    profile: Profile, columns: list[Column], signature: Signature
) -> tuple[list[Column], list[str]]:
    """The columns that a profile can judge, and a sentence for each that it cannot.

    A one-column tensor may also be named with its position, `input:x[0]`.
    """
    problems: list[str] = []
    fitting: list[Column] = []
    known = {column.channel: column for column in (*answers_of(signature), *columns)}
    known |= {f"{column.channel}[0]": column for column in columns if column.is_alone}
    for name, channel in profile.channels.items():
        if (column := known.get(name)) is None:
            problems.append(f"reference column {name!r} is no input or output of the model")
            continue
        specs = signature.outputs if column.is_output else signature.inputs
        datatype = specs[column.tensor].datatype
        is_text = datatype == "BYTES" if not column.made else column.made == "class"
        if is_text != (channel.kind == "categorical"):
            problems.append(
                f"reference column {name!r} is {channel.kind}, the model's is"
                f" {column.made or datatype}: not watched"
            )
            continue
        fitting.append(replace(column, channel=name))
    covered = {(c.is_output, c.tensor, c.position) for c in fitting if not c.made}
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
