"""ONNX sessions: opened, tried out, measured, run, closed.

What a model can do is found out by running it, not configured: whether rows of several requests may
share a run, whether that pays, and whether a run is shorter than a hop to another thread and back.
"""

import copy
import ctypes
import functools
import re
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime

from gateway.config import BatchConfig, RuntimeConfig
from gateway.errors import InputRefusedError, ModelFailedError, VersionRefusedError
from gateway.tensors import BFLOAT16, DTYPES, Array, narrowed, stack, widened
from registry.signature import Signature, TensorSpec

_DATATYPES = {
    "tensor(bool)": "BOOL",
    "tensor(uint8)": "UINT8",
    "tensor(uint16)": "UINT16",
    "tensor(uint32)": "UINT32",
    "tensor(uint64)": "UINT64",
    "tensor(int8)": "INT8",
    "tensor(int16)": "INT16",
    "tensor(int32)": "INT32",
    "tensor(int64)": "INT64",
    "tensor(float16)": "FP16",
    "tensor(bfloat16)": "BF16",
    "tensor(float)": "FP32",
    "tensor(double)": "FP64",
    "tensor(string)": "BYTES",
}
_ONNX_BFLOAT16 = 16
"""The number of the type in ONNX's own enumeration, TensorProto.DataType."""
_TRIAL_S_MAX = 0.5
"""A trial batch that would take longer than this is not run."""
_GAIN_MIN = 1.2
"""Rows must get at least this much cheaper in a full batch, or a slow model is not batched."""
_SLOW_S = 0.001
"""A run this long costs far more than handing it to a thread: only then is the gain looked at."""


@dataclass(frozen=True, slots=True)
class Trial:
    """What was found out about a version when it was warmed up."""

    can_batch: bool
    """Rows of several requests may share a run."""
    is_inline: bool
    """Runs on the event loop, since that is shorter than a hop to a thread."""
    reason: str
    """Why it is batched or not, in words."""
    run_s: dict[int, float]
    """Seconds of the fastest run by rows; empty when no trial input was accepted."""

    def rows_within(self, seconds: float) -> int:
        """Rows that a run of so many seconds can take, as far as its largest trial tells."""
        rows = max(self.run_s, default=0)
        return int(rows * seconds / self.run_s[rows]) if rows else 0


class Session:
    """One version, opened. `run` may be called from one thread at a time."""

    def __init__(self, file: Path, config: RuntimeConfig) -> None:
        """Open an ONNX file.

        Raises
        ------
        VersionRefusedError : it is no model that can be served, with the reason.
        """
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = config.intra_op_threads
        options.inter_op_num_threads = 1
        options.log_severity_level = 4  # what goes wrong is raised, and said once, by us
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        if config.arena_bytes_max:
            _share_arena(config.arena_bytes_max)
            options.add_session_config_entry("session.use_env_allocators", "1")
            # Weights are no part of what runs take: they come and go with their session.
            options.add_session_config_entry("session.use_device_allocator_for_initializers", "1")
        try:
            self._session = onnxruntime.InferenceSession(
                str(file), options, providers=["CPUExecutionProvider"]
            )
        except Exception as error:  # noqa: BLE001  onnxruntime's errors share no base class
            raise VersionRefusedError(f"cannot be opened: {_reason(error, file)}") from None
        self.signature = Signature(
            tuple(_spec(node, "input") for node in self._session.get_inputs()),
            tuple(_spec(node, "output") for node in self._session.get_outputs()),
        )
        if not self.signature.inputs:
            raise VersionRefusedError("cannot be served: it takes no input")
        self._names = [spec.name for spec in self.signature.inputs]
        kinds = [spec.datatype for spec in self.signature.inputs]
        self._options = onnxruntime.RunOptions()
        self._is_over = False
        self._run = self._session.run
        if "BF16" in kinds or any(spec.datatype == "BF16" for spec in self.signature.outputs):
            if "BYTES" in kinds:
                raise VersionRefusedError(
                    "cannot be served: onnxruntime for Python takes BYTES or BF16, not both"
                )
            self._run = self._run_values

    def run(self, arrays: Sequence[Array]) -> list[Array]:
        """All outputs for the inputs, both in the model's order.

        Raises
        ------
        InputRefusedError : the model refuses these values.
        ModelFailedError : the model failed on them.
        """
        self._options.terminate = self._is_over
        given = dict(zip(self._names, arrays, strict=True))
        try:
            outputs: list[Array] = self._run(None, given, self._options)
        except Exception as error:  # noqa: BLE001  onnxruntime's errors share no base class
            raise _failure(error) from None
        return outputs

    def twin(self) -> "Session":
        """Another way into the same session, on the same memory, with runs that end apart."""
        other = copy.copy(self)
        other._options = onnxruntime.RunOptions()  # noqa: SLF001  its own kind
        if self._run == self._run_values:
            other._run = other._run_values  # noqa: SLF001  same
        return other

    def stop(self) -> None:
        """Ask the run under way to end; from any thread.

        It ends between two operators, in loops between two rounds; never inside a kernel.
        """
        self._options.terminate = True

    def end(self) -> None:
        """End the run under way as `stop` does, and all that follow; from any thread."""
        self._is_over = True
        self._options.terminate = True

    def _run_values(
        self, _: None, arrays: dict[str, Array], options: onnxruntime.RunOptions
    ) -> list[Array]:
        """Run on values of onnxruntime's own: numpy has no bfloat16, and `run` takes only numpy."""
        given = {name: _value(np.ascontiguousarray(array)) for name, array in arrays.items()}
        values = self._session.run_with_ort_values(None, given, options)
        return [
            _bits(value) if spec.datatype == "BF16" else value.numpy()
            for spec, value in zip(self.signature.outputs, values, strict=True)
        ]

    def try_out(self, batch: BatchConfig, config: RuntimeConfig) -> Trial:
        """Warm the session and find out how it may be run. Takes about a second at most."""
        found = next(self._accepted_rows(), None)
        if found is None:
            reason = "no trial input was accepted: its runs are not measured"
            return Trial(can_batch=False, is_inline=False, reason=reason, run_s={})
        can_batch, reason = False, "a tensor has no free first axis"
        if self.signature.has_row_axis:
            can_batch, reason = self._rows_are_independent(found)
        alone = [array[:1] for array in found] if can_batch else found
        run_s = {len(alone[0]) if alone[0].ndim else 1: self._fastest(alone)}
        if can_batch:
            try:
                self._measure(found, batch.rows_max, run_s)
            except (InputRefusedError, ModelFailedError):
                can_batch, reason = False, "it fails on a fuller batch"
                run_s = {1: run_s[1]}
        slowest = max(run_s)
        gain = run_s[1] * slowest / run_s[slowest] if can_batch else 1.0
        if can_batch and batch.rows_max > 1 and run_s[1] >= _SLOW_S and gain < _GAIN_MIN:
            can_batch = False
            reason = f"rows get no cheaper together ({gain:.2f} x at {slowest} rows)"
            if slowest == 1:
                reason = f"a row takes {run_s[1]:.2g} s: too long to try several together"
        is_measured = slowest == batch.rows_max or not can_batch
        return Trial(
            can_batch=can_batch,
            is_inline=is_measured and run_s[slowest] < config.inline_s_max,
            reason=reason,
            run_s=run_s,
        )

    def _accepted_rows(self) -> Iterator[list[Array]]:
        """Two different rows of made-up input that the model accepts, if any kind does."""
        for size in (1, 8, 32):  # of free axes behind the first
            for is_zero in (False, True):
                rows = [_made_up(spec, size, is_zero=is_zero) for spec in self.signature.inputs]
                try:
                    self.run(rows)
                except (InputRefusedError, ModelFailedError):
                    continue
                yield rows

    def _rows_are_independent(self, rows: list[Array]) -> tuple[bool, str]:
        """Whether two rows together give what each gives alone."""
        if all(np.array_equal(array[0], array[1]) for array in rows):
            return False, "only rows without values were accepted: nothing shows independence"
        apart = [[array[k : k + 1] for array in rows] for k in range(2)]
        try:
            alone = [self.run(arrays) for arrays in apart]
            together = self.run(rows)
        except (InputRefusedError, ModelFailedError):
            return False, "it fails on one row or on two"
        if any(array.shape[:1] != (1,) for outputs in alone for array in outputs) or any(
            array.shape[:1] != (2,) for array in together
        ):
            return False, "an output has not one row for each row of the inputs"
        if not all(map(_agree, stack(alone), together)):
            return False, "a row's answer depends on the other rows"
        return True, "rows are independent"

    def _measure(self, rows: list[Array], rows_max: int, run_s: dict[int, float]) -> None:
        """Add the seconds of the fastest run of 8 and of `rows_max` rows, as far as time allows.

        Where 8 would take too long, 2 are tried first: they may be as fast as one.
        """
        sizes = {min(8, rows_max), rows_max}
        if rows_max > 1 and run_s[1] * min(sizes) > _TRIAL_S_MAX:
            sizes.add(2)
        for n in sorted(sizes):
            expected_s = run_s[max(run_s)] / max(run_s) * n
            if n > 1 and expected_s <= _TRIAL_S_MAX * (2 if n == 2 else 1):
                batch = [np.resize(array, (n, *array.shape[1:])) for array in rows]
                run_s[n] = self._fastest(batch)

    def _fastest(self, arrays: list[Array]) -> float:
        """Of up to 30 runs, or as many as fit into 50 ms."""
        fastest, until = float("inf"), time.perf_counter() + 0.05
        for _ in range(30):
            start = time.perf_counter()
            self.run(arrays)
            end = time.perf_counter()
            fastest = min(fastest, end - start)
            if end > until:
                break
        return fastest


@functools.cache
def _share_arena(bytes_max: int) -> None:
    """Let all sessions of this process take the memory of their runs from one bounded arena."""
    memory = onnxruntime.OrtMemoryInfo(
        "Cpu",
        onnxruntime.OrtAllocatorType.ORT_ARENA_ALLOCATOR,
        0,
        onnxruntime.OrtMemType.DEFAULT,
    )
    limits = onnxruntime.OrtArenaCfg({"max_mem": bytes_max})
    onnxruntime.create_and_register_allocator(memory, limits)


def _value(array: Array) -> Any:
    if array.dtype != BFLOAT16:
        return onnxruntime.OrtValue.ortvalue_from_numpy(array)
    return onnxruntime.OrtValue.ortvalue_from_numpy_with_onnx_type(
        array.view("<u2"), _ONNX_BFLOAT16
    )


def _bits(value: Any) -> Array:
    """A BF16 value of onnxruntime as an array; a copy, since the value goes."""
    size = value.tensor_size_in_bytes()
    data = ctypes.string_at(value.data_ptr(), size) if size else b""
    return np.frombuffer(data, BFLOAT16).reshape(value.shape())


def _spec(node: Any, role: str) -> TensorSpec:
    kind = _DATATYPES.get(node.type)
    if kind is None:
        hint = " (export a classifier with zipmap off)" if node.type.startswith("seq(map") else ""
        raise VersionRefusedError(
            f"cannot be served: {role} {node.name!r} is a {node.type}{hint};"
            f" tensors of {', '.join(_DATATYPES.values())} can be"
        )
    shape = tuple(size if isinstance(size, int) and size >= 0 else -1 for size in node.shape or ())
    return TensorSpec(node.name, kind, shape)


def _made_up(spec: TensorSpec, size: int, *, is_zero: bool) -> Array:
    """Two different rows where the first axis is free; other free axes get `size`."""
    shape = tuple(n if n >= 0 else (2 if k == 0 else size) for k, n in enumerate(spec.shape))
    n = int(np.prod(shape))
    dtype = DTYPES[spec.datatype]
    # Neighbours differ along a row and from row to row, whatever the width.
    row, column = np.divmod(np.arange(n), max(n // shape[0], 1) if shape and n else 1)
    pattern = row + column
    if spec.datatype == "BYTES":
        texts = [""] * n if is_zero else [str(k % 7) for k in pattern]
        return np.array(texts, dtype=np.object_).reshape(shape)
    if is_zero:
        return np.zeros(shape, dtype)
    # Small whole numbers may be indices, so only 0 and 1 are tried there.
    values = np.random.default_rng(n).normal(size=n) if dtype.kind in "fV" else pattern % 2
    if dtype == BFLOAT16:
        return narrowed(values.astype(np.float32)).reshape(shape)
    return values.astype(dtype).reshape(shape)


def _agree(a: Array, b: Array) -> bool:
    """Equal up to the rounding that another order of additions brings."""
    if a.dtype == BFLOAT16:
        return bool(np.allclose(widened(a), widened(b), rtol=0.05, atol=0.005, equal_nan=True))
    if a.dtype.kind == "f":
        tolerance = 1e-2 if a.dtype == np.float16 else 1e-4
        return bool(np.allclose(a, b, rtol=tolerance, atol=tolerance * 0.1, equal_nan=True))
    return bool(np.array_equal(a, b))


def _reason(error: Exception, file: Path) -> str:
    """Say it in onnxruntime's own words, without its codes, paths and sources."""
    text = str(error).replace(str(file), "the model file").splitlines()[0]
    text = re.sub(r"\[ONNXRuntimeError\] : \d+ : \w+ : ", "", text)
    text = re.sub(r"(Load model from )?the model file failed:\s*", "", text)
    text = re.sub(r"\S*/\S+|\bonnxruntime::\S+", "", text)
    return re.sub(r"\s+", " ", text).strip()[:300] or type(error).__name__


def _failure(error: Exception) -> InputRefusedError | ModelFailedError:
    """The error of a run, in our words: names of operators, but no value, path or source."""
    kind = type(error).__name__
    operator = re.search(r"running (\w+) node", str(error))
    where = f" in its operator {operator[1]}" if operator else ""
    if re.search(r"smaller than requested bytes|Failed to allocate memory|bad_alloc", str(error)):
        return ModelFailedError(
            f"the model wants more memory for this input{where} than its runs may take"
            " (runtime.arena_bytes_max)"
        )
    if kind == "InvalidArgument":
        return InputRefusedError(
            f"the model refuses these values{where}: they fit its signature, but not its graph"
        )
    return ModelFailedError(f"the model failed on this input{where} ({kind})")
