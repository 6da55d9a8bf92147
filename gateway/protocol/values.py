"""Nested JSON values without datatypes, and their fit to a model's tensors.

The contracts of other servers send bare values: `[[1, 2], [3, 4]]`, or columns of a table. What
they are is known only when the model is: values are flattened when the body is decoded, off the
event loop if it is large, and get their datatype when the call is bound.
"""

import base64
import binascii
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import numpy as np

from gateway.errors import BadRequestError, TensorError, TooLargeError, shown
from gateway.protocol.v2_json import kind, parse
from gateway.tensors import DTYPES, Array, narrowed, widened
from registry.signature import Signature, TensorSpec

COLUMNS_MAX = 65_536
"""Columns of one request."""
_RANK_MAX = 32
_EXACT_MAX = 2**53
"""Beyond this a float may have lost digits of the integer that it was."""
_NUMBERS: frozenset[type] = frozenset((int, float))
_FLOATS = frozenset(("FP16", "BF16", "FP32", "FP64"))
_MISSING = frozenset(("", "na", "n/a", "nan", "null", "none"))
_TRUTH = {"true": True, "false": False}


@dataclass(slots=True)
class Values:
    """Elements in row-major order, and how they were nested."""

    flat: list[Any]
    shape: tuple[int, ...]
    kinds: frozenset[type]
    """Types that occur in `flat`."""
    array: Array | None = None
    """The elements as int64 or float64, where they all are numbers; missing ones are NaN."""


@dataclass(frozen=True, slots=True)
class Origin:
    """How the elements of a body are called in an error, and how strict its format is."""

    noun: str = "input"
    is_table: bool = False
    """A missing value is null, and columns that the model does not take are passed over."""
    is_text: bool = False
    """Everything came as text, as in CSV: numbers are read from it."""


TENSORS = Origin()
TABLE = Origin("column", is_table=True)
CSV = Origin("column", is_table=True, is_text=True)


def read_json(body: bytes, bytes_max: int) -> dict[str, Any]:
    """The JSON object of a body; a bare NaN or Infinity is read, as numeric clients write it.

    Raises
    ------
    TooLargeError, BadRequestError
    """
    if len(body) > bytes_max:
        raise TooLargeError(f"the JSON is longer than {bytes_max} bytes (limits.json_bytes_max)")
    value, _ = parse(body, "a prediction request")
    if type(value) is not dict:
        raise BadRequestError(f"the body must be a JSON object, not {kind(value)}")
    return value


def values_of(nested: Any, name: str, noun: str = "input") -> Values:
    """The elements of nested lists, in row-major order.

    Raises
    ------
    TensorError : lists of one level differ in length, or are nested too deep.
    """
    level: list[Any] = [nested]
    shape: list[int] = []
    while level and type(level[0]) is list:
        size = len(level[0])
        for k, inner in enumerate(level):
            if type(inner) is not list or len(inner) != size:
                row = k // (len(level) // shape[0]) if shape else 0
                got = f"a list of {len(inner)}" if type(inner) is list else kind(inner)
                raise TensorError(
                    f"{noun} {shown(name)}: row {row} has {got} where row 0 has a list of {size}"
                )
        shape.append(size)
        if len(shape) > _RANK_MAX:
            raise TensorError(f"{noun} {shown(name)}: lists are nested deeper than {_RANK_MAX}")
        level = list(chain.from_iterable(level))
    return flat_values(level, tuple(shape))


def flat_values(flat: list[Any], shape: tuple[int, ...]) -> Values:
    """Elements with the shape they are known to have."""
    kinds = frozenset(map(type, flat))
    array: Array | None = None
    if kinds and kinds <= {int, float, type(None)}:
        try:
            array = np.array(flat, np.int64 if kinds == {int} else np.float64)
        except OverflowError:
            array = None  # Beyond int64: looked at again when the datatype is known.
    return Values(flat, shape, kinds, array)


def text_values(texts: list[str]) -> Values:
    """One column of text in which missing numbers may be spelled in several ways."""
    array: Array | None = None
    joined = "".join(texts)
    # float() also reads underscores and the digits of other scripts.
    if joined.isascii() and "_" not in joined:
        try:
            numbers = [np.nan if _is_missing(text) else float(text) for text in texts]
            array = np.array(numbers)
        except ValueError:
            array = None
    return Values(list(texts), (len(texts),), frozenset((str,)), array)


def bound(
    columns: Mapping[str, Values], signature: Signature, model: str, origin: Origin
) -> list[Array]:
    """Named values as the model's arrays; the columns of a table may also make up one matrix.

    Raises
    ------
    TensorError : a name is missing or unknown, or values are not what the model takes.
    """
    specs = signature.inputs
    names = [spec.name for spec in specs]
    if all(name in columns for name in names):
        extra = [name for name in columns if name not in names]
        if extra and not origin.is_table:
            raise TensorError(
                f"model {model!r} has no input {shown(extra[0])}; it takes: {_list(names)}"
            )
        return [tensor(columns[spec.name], spec, model, origin) for spec in specs]
    if len(specs) == 1 and len(specs[0].shape) == 2:
        return [_matrix(columns, specs[0], model, origin)]
    missing = [name for name in names if name not in columns]
    raise TensorError(
        f"{origin.noun} {_list(missing)} is missing; model {model!r} takes: {_list(names)}"
    )


def bare(values: Values, signature: Signature, model: str) -> list[Array]:
    """Values without a name, as the only input.

    Raises
    ------
    TensorError : the model takes several inputs, or something else.
    """
    specs = signature.inputs
    if len(specs) != 1:
        names = [spec.name for spec in specs]
        raise TensorError(
            f"model {model!r} takes {len(specs)} inputs: send objects that name them:"
            f" {_list(names)}"
        )
    return [tensor(values, specs[0], model, TENSORS)]


def tensor(values: Values, spec: TensorSpec, model: str, origin: Origin) -> Array:
    """The values in the datatype and shape of an input.

    Raises
    ------
    TensorError : an element of another kind or out of range, or a shape that does not fit.
    """
    shape = values.shape
    rank = len(spec.shape)
    if len(shape) < rank and all(size == 1 for size in spec.shape[len(shape) :]):
        shape += (1,) * (rank - len(shape))  # A column for a matrix of one column.
    # A model may leave the rank of an input open, which reads as a shape without axes.
    if spec.shape and not spec.fits(shape):
        raise TensorError(
            f"{origin.noun} {spec.name!r} of model {model!r} has shape {_shape(spec.shape)}"
            f"{' (-1: any size)' if -1 in spec.shape else ''}, the request gives"
            f" {_shape(values.shape)}"
        )
    return _typed(values, spec.datatype, spec.name, origin).reshape(shape)


def _matrix(columns: Mapping[str, Values], spec: TensorSpec, model: str, origin: Origin) -> Array:
    """Columns side by side: by the names that the profile gives them, else as they came."""
    width = spec.shape[1]
    places = tuple(f"{spec.name}[{j}]" for j in range(len(columns)))
    if spec.columns:
        if missing := [name for name in spec.columns if name not in columns]:
            raise TensorError(
                f"{origin.noun} {_list(missing)} is missing; input {spec.name!r} of model"
                f" {model!r} has the columns: {_list(list(spec.columns))}"
            )
        if len(columns) > len(spec.columns) and not origin.is_table:
            extra = next(name for name in columns if name not in spec.columns)
            raise TensorError(
                f"input {spec.name!r} of model {model!r} has no column {shown(extra)}"
            )
        order: Sequence[str] = spec.columns
    else:
        order = places if all(place in columns for place in places) else list(columns)
    if width not in (-1, len(order)):
        raise TensorError(
            f"input {spec.name!r} of model {model!r} takes {width} columns,"
            f" the request gives {len(order)}"
        )
    rows = columns[order[0]].shape
    arrays: list[Array] = []
    for name in order:
        values = columns[name]
        if len(values.shape) != 1 or values.shape != rows:
            raise TensorError(
                f"{origin.noun} {shown(name)} has shape {_shape(values.shape)}, {origin.noun}"
                f" {shown(order[0])} {_shape(rows)}: a matrix takes lists of one length"
            )
        arrays.append(_typed(values, spec.datatype, name, origin))
    return np.stack(arrays, axis=1)


def _typed(values: Values, datatype: str, name: str, origin: Origin) -> Array:
    """The elements, flat, in a datatype."""
    if datatype in _FLOATS:
        return _floats(values, datatype, name, origin)
    if datatype == "BYTES":
        return _texts(values, name, origin)
    if datatype == "BOOL":
        return _booleans(values, name, origin)
    return _integers(values, datatype, name, origin)


def _floats(values: Values, datatype: str, name: str, origin: Origin) -> Array:
    may_be_missing = origin.is_table
    array = values.array
    if array is None or (type(None) in values.kinds and not may_be_missing):
        allowed = _NUMBERS | {type(None)} if may_be_missing else _NUMBERS
        for k, value in enumerate(values.flat):
            if origin.is_text:
                if not _is_missing(value) and not _is_number(value):
                    raise _wrong(values, k, name, origin, f"{datatype} takes numbers")
            elif type(value) not in allowed:
                hint = " (a missing value is NaN)" if value is None else ""
                raise _wrong(values, k, name, origin, f"{datatype} takes numbers{hint}")
        array = _wide(values, datatype, name, origin)
    is_half = datatype == "BF16"
    dtype = DTYPES["FP32" if is_half else datatype]
    with np.errstate(over="ignore"):
        cast = array.astype(dtype)
    kept = cast
    if is_half:
        cast = narrowed(cast)
        kept = widened(cast)
    if dtype.itemsize < 8:
        lost = np.isinf(kept)
        if lost.any():
            lost &= np.isfinite(array)
            if lost.any():
                k = int(np.flatnonzero(lost)[0])
                raise _wrong(values, k, name, origin, f"{datatype} cannot hold it: out of range")
    return cast


def _wide(values: Values, datatype: str, name: str, origin: Origin) -> Array:
    """Integers beyond int64 as floats, each looked at: one may be beyond every float."""
    numbers: list[float] = []
    for k, value in enumerate(values.flat):
        try:
            numbers.append(np.nan if value is None else float(value))
        except OverflowError:
            raise _wrong(
                values, k, name, origin, f"{datatype} cannot hold it: out of range"
            ) from None
    return np.array(numbers, np.float64)


def _integers(values: Values, datatype: str, name: str, origin: Origin) -> Array:
    limits = np.iinfo(DTYPES[datatype])
    right = f"{datatype} takes integers from {limits.min} to {limits.max}"
    array = values.array
    if values.kinds == {int} and array is not None:
        if array.size and (array.min() < limits.min or array.max() > limits.max):
            k = next(k for k, n in enumerate(values.flat) if not limits.min <= n <= limits.max)
            raise _wrong(values, k, name, origin, right)
        return array.astype(DTYPES[datatype])
    numbers: list[int] = []
    for k, value in enumerate(values.flat):
        number = _integer(value, origin)
        if number is None or not limits.min <= number <= limits.max:
            raise _wrong(values, k, name, origin, right)
        numbers.append(number)
    return np.array(numbers, DTYPES[datatype])


def _integer(value: Any, origin: Origin) -> int | None:
    """The integer that a value is; a float must be one exactly."""
    if origin.is_text and type(value) is str:
        text = value.strip()
        digits = text.removeprefix("-").removeprefix("+")
        if digits.isascii() and digits.isdigit() and len(digits) <= 20:
            return int(text)
        value = float(text) if _is_number(text) else None
    if type(value) is int:
        return value
    if type(value) is float and value.is_integer() and abs(value) <= _EXACT_MAX:
        return int(value)
    return None


def _booleans(values: Values, name: str, origin: Origin) -> Array:
    if origin.is_text:
        flat = [_TRUTH.get(text.strip().lower()) for text in values.flat]
    else:
        flat = [value if type(value) is bool else None for value in values.flat]
    if None in flat:
        raise _wrong(values, flat.index(None), name, origin, "BOOL takes true or false")
    return np.array(flat, np.bool_)


def _texts(values: Values, name: str, origin: Origin) -> Array:
    if values.kinds <= {str}:
        flat = values.flat
    else:
        flat = [_text(values, k, name, origin) for k in range(len(values.flat))]
    try:
        "".join(flat).encode("utf-8")
    except UnicodeEncodeError:
        raise TensorError(f"{origin.noun} {shown(name)}: half a surrogate pair in a text") from None
    return np.array(flat, np.object_)


def _text(values: Values, k: int, name: str, origin: Origin) -> str:
    value = values.flat[k]
    if type(value) is str:
        return value
    if type(value) is not dict or set(value) != {"b64"} or type(value["b64"]) is not str:
        raise _wrong(values, k, name, origin, 'BYTES takes text, or {"b64": "..."}')
    try:
        return base64.b64decode(value["b64"], validate=True).decode("utf-8")
    except UnicodeDecodeError:
        raise _wrong(values, k, name, origin, "a text of an ONNX model is UTF-8") from None
    except (binascii.Error, ValueError):
        raise _wrong(values, k, name, origin, "b64 takes base64") from None


def _wrong(values: Values, k: int, name: str, origin: Origin, right: str) -> TensorError:
    """Element k is not what it should be."""
    value = "null" if values.flat[k] is None else shown(values.flat[k])
    where = f"{origin.noun} {shown(name)}"
    if values.shape:
        per_row = len(values.flat) // values.shape[0]
        place = f"row {k // per_row}" + (f", element {k % per_row}," if per_row > 1 else "")
        return TensorError(f"{where}: {place} is {value}; {right}")
    return TensorError(f"{where} is {value}; {right}")


def _is_missing(text: str) -> bool:
    return text.strip().lower() in _MISSING


def _is_number(text: str) -> bool:
    if not text.isascii() or "_" in text:
        return False
    try:
        float(text)
    except ValueError:
        return False
    return True


def _shape(shape: Sequence[int]) -> str:
    return "[" + ", ".join(map(str, shape)) + "]"


def _list(names: Sequence[str]) -> str:
    more = f" and {len(names) - 10} more" if len(names) > 10 else ""
    return ", ".join(shown(name) for name in names[:10]) + more
