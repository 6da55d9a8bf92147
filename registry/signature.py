"""Names, datatypes and shapes of a version's tensors. Pure: knows neither ONNX nor numpy."""

from dataclasses import dataclass, field

DATATYPES = (
    "BOOL",
    "UINT8",
    "UINT16",
    "UINT32",
    "UINT64",
    "INT8",
    "INT16",
    "INT32",
    "INT64",
    "FP16",
    "BF16",
    "FP32",
    "FP64",
    "BYTES",
)
"""The Open Inference Protocol's names, and BF16, which Triton added."""


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """What one tensor of a model must look like."""

    name: str
    datatype: str
    """One of DATATYPES."""
    shape: tuple[int, ...]
    """Sizes of the axes; -1 where any size will do."""
    columns: tuple[str, ...] = field(default=(), compare=False)
    """Names of the columns of a matrix, where its reference profile tells them."""

    def fits(self, shape: tuple[int, ...]) -> bool:
        """Whether a tensor of this shape may be given."""
        if len(shape) != len(self.shape):
            return False
        # A plain loop: this runs for every tensor of every request.
        for want, got in zip(self.shape, shape, strict=False):  # noqa: SIM110  all() is slower
            if want not in (got, -1):
                return False
        return True

    @property
    def row_shape(self) -> tuple[int, ...]:
        """Sizes of the axes behind the first, which counts rows."""
        return self.shape[1:]


@dataclass(frozen=True, slots=True)
class Signature:
    """The tensors a model takes and gives, in the model's own order."""

    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    has_row_axis: bool = field(init=False, compare=False)
    """Whether every tensor starts with a free axis: the least that batching needs."""

    def __post_init__(self) -> None:
        starts = [spec.shape[:1] for spec in (*self.inputs, *self.outputs)]
        object.__setattr__(self, "has_row_axis", all(start == (-1,) for start in starts))


def misfits(before: Signature, after: Signature) -> list[str]:
    """Why clients of one version could not go on with another; empty when they can.

    Inputs must have the same names and datatypes and take every shape that was taken; outputs that
    were there must be there still, alike. The first axis counts rows and may differ.
    """
    problems = [
        *_differences("input", before.inputs, after.inputs),
        *_differences("output", before.outputs, after.outputs),
    ]
    wanted = {spec.name for spec in before.inputs}
    problems += [f"input {spec.name!r} is new" for spec in after.inputs if spec.name not in wanted]
    return problems


def _differences(
    kind: str, before: tuple[TensorSpec, ...], after: tuple[TensorSpec, ...]
) -> list[str]:
    problems: list[str] = []
    by_name = {spec.name: spec for spec in after}
    for was in before:
        now = by_name.get(was.name)
        if now is None:
            problems.append(f"{kind} {was.name!r} is missing")
        elif now.datatype != was.datatype:
            problems.append(f"{kind} {was.name!r} is {now.datatype}, not {was.datatype}")
        else:
            given, taken = (now, was) if kind == "output" else (was, now)
            fits = len(given.shape) == len(taken.shape) and all(
                want in (got, -1)
                for want, got in zip(taken.row_shape, given.row_shape, strict=True)
            )
            if not fits:
                problems.append(
                    f"{kind} {was.name!r} has shape {list(now.shape)}, not {list(was.shape)}"
                )
    return problems
