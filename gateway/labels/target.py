"""What of an answer a label is compared with: an output, or one column of it. Pure."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

from gateway.errors import ConfigError, nearest
from registry.signature import Signature, TensorSpec

Task = Literal["auto", "binary", "multiclass", "regression"]
TASKS: tuple[Task, ...] = get_args(Task)
_FLOATS = frozenset(("FP16", "BF16", "FP32", "FP64"))


@dataclass(frozen=True, slots=True)
class Target:
    """Where a prediction is, and of what kind."""

    output: str
    """Name of the output."""
    column: int | None = None
    """Column of a matrix of probabilities that is the score; None: the output has one value a row,
    or one probability for each class."""
    task: Task = "auto"
    """auto: binary when all labels are 0 or 1 and all scores within [0, 1], else regression."""
    takes_text: bool = False
    """Labels are names of classes; else numbers."""
    positive: float | str = 1.0
    """The label that is class 1 of a binary task; any other is class 0."""
    is_named: bool = False
    """Whether `positive` is declared; else only 0 and 1 are labels of a binary task."""
    threshold: float = 0.5
    """Scores from here on count as class 1."""

    def truth(self, label: float | str) -> float | None:
        """A label of a binary task as 0 or 1; None when it is neither."""
        if self.is_named:
            return float(label == self.positive)
        return label if isinstance(label, float) and label in {0.0, 1.0} else None

    def value(self, outputs: Mapping[str, Any]) -> Any:
        """The prediction among one row's outputs: a number, a text or a list of probabilities."""
        found = outputs.get(self.output)
        if isinstance(found, list):
            if self.column is not None:
                return found[self.column] if self.column < len(found) else None
            return found[0] if len(found) == 1 else found
        return found


def of(signature: Signature, declared: Mapping[str, Any] | None = None) -> Target | None:
    """The target that is declared, else the one that the outputs suggest; None: there is none.

    Suggested is the first floating-point output with one value a row (a score or a number), else
    the first with two (the probability of class 1), else with more (a probability for each class),
    else the first output with one value a row (a class).

    Raises
    ------
    ConfigError : what is declared does not fit the outputs.
    """
    if declared:
        return _declared(signature, declared)
    widths = {spec.name: _width(spec) for spec in signature.outputs}
    floats = [spec for spec in signature.outputs if spec.datatype in _FLOATS]
    for wanted in (1, 2):
        for spec in floats:
            if widths[spec.name] == wanted:
                return Target(spec.name, column=1 if wanted == 2 else None)
    for spec in floats:
        if (widths[spec.name] or 0) > 2:
            return Target(spec.name, task="multiclass")
    for spec in signature.outputs:
        if widths[spec.name] == 1:
            return Target(spec.name, task="multiclass", takes_text=spec.datatype == "BYTES")
    return None


FIELDS = ("output", "column", "task", "positive", "threshold")


def _declared(signature: Signature, declared: Mapping[str, Any]) -> Target:
    for field in declared:
        if field not in FIELDS:
            raise ConfigError(f"target.{field}: no such field; there are: {', '.join(FIELDS)}")
    suggested = of(signature)
    names = [spec.name for spec in signature.outputs]
    name = declared.get("output", suggested.output if suggested else None)
    found = next((spec for spec in signature.outputs if spec.name == name), None)
    if found is None:
        match = nearest(str(name), names)
        raise ConfigError(
            f"target.output = {name!r}: no such output"
            + (f"; did you mean {match!r}?" if match else f"; there are: {', '.join(names)}")
        )
    if declared.get("task") not in (None, *TASKS):
        raise ConfigError(f"target.task = {declared['task']!r}: must be one of {', '.join(TASKS)}")
    width, column = _width(found), declared.get("column")
    is_column = type(column) is int and column >= 0 and (width is None or column < width)
    if column is not None and not is_column:
        raise ConfigError(f"target.column = {column!r}: output {name!r} has {width} columns")
    if column is None and suggested is not None and suggested.output == name:
        column = suggested.column
    task: Task = declared.get("task") or "auto"
    positive = declared.get("positive")
    if positive is not None and task == "auto":
        task = "binary"
    is_text = found.datatype == "BYTES"
    if is_text and task in {"binary", "regression"}:
        raise ConfigError(f"target.task = {task!r}: output {name!r} is text, which has classes")
    return Target(
        found.name,
        column,
        "multiclass" if is_text else task,
        takes_text=is_text or isinstance(positive, str),
        positive=positive
        if isinstance(positive, str)
        else float(positive or 0.0)
        if positive is not None
        else 1.0,
        is_named=positive is not None,
        threshold=declared.get("threshold", 0.5),
    )


def _width(spec: TensorSpec) -> int | None:
    """Values of one row; None: as many as it likes."""
    width = 1
    for size in spec.row_shape:
        if size < 0:
            return None
        width *= size
    return width if spec.shape[:1] == (-1,) else None
