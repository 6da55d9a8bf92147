"""Tensors as raw bytes: little endian, row-major, without gaps.

A text is four bytes of length, then UTF-8. Everything is checked against the number of bytes that
are there before anything is made of them.
Source: Triton, "binary tensor data extension".
"""

import struct

import numpy as np

from gateway.errors import TensorError, shown
from gateway.tensors import DTYPES, Array

_LENGTH = struct.Struct("<I")


def read(
    data: bytes | memoryview, kind: str, shape: tuple[int, ...], count: int, name: str
) -> Array:
    """The tensor in these bytes: a view of them, unless they lie where numbers cannot be read.

    Parameters
    ----------
    count : elements that the shape stands for

    Raises
    ------
    TensorError : too few or too many bytes, or bytes that are no value of the datatype.
    """
    if kind == "BYTES":
        array: Array = np.empty(count if count <= len(data) // 4 else 0, np.object_)
        array[:] = _texts(data, count, name)
    else:
        dtype = DTYPES[kind]
        if len(data) != count * dtype.itemsize:
            raise TensorError(
                f"input {shown(name)}: shape {shown(list(shape))} of {kind} needs"
                f" {count * dtype.itemsize} bytes, there are {len(data)}"
            )
        array = np.frombuffer(data, dtype)
        if kind == "BOOL" and array.view(np.uint8).max(initial=0) > 1:
            raise TensorError(f"input {shown(name)}: a BOOL is a byte 0 or 1")
        if not array.flags.aligned:
            array = array.copy()  # Vector instructions of a kernel may rely on it.
    try:
        return array.reshape(shape)
    except (ValueError, OverflowError):
        raise TensorError(f"input {shown(name)}: no array can have shape {shown(shape)}") from None


def write(array: Array) -> bytes:
    """The bytes of a tensor."""
    if array.dtype.kind not in "OUS":
        return array.tobytes()
    parts: list[bytes] = []
    for text in array.ravel().tolist():
        element = text if isinstance(text, bytes) else str(text).encode("utf-8")
        parts += (_LENGTH.pack(len(element)), element)
    return b"".join(parts)


def _texts(data: bytes | memoryview, count: int, name: str) -> list[str]:
    """`count` elements, each four bytes of length and then so many bytes."""
    size, at = len(data), 0
    texts: list[str] = []
    while at < size and len(texts) < count:
        start = at + 4
        at = start + _LENGTH.unpack_from(data, at)[0] if start <= size else size + 1
        if at > size:
            raise TensorError(
                f"input {shown(name)}: element {len(texts)} goes beyond the {size} bytes there are"
            )
        texts.append(text(data[start:at], len(texts), name))
    if len(texts) != count or at != size:
        raise TensorError(
            f"input {shown(name)}: {count} BYTES elements are expected; there are {len(texts)},"
            f" and {size - at} bytes more"
        )
    return texts


def text(data: bytes | memoryview, k: int, name: str) -> str:
    """Element k of a BYTES tensor. ONNX models take text, so other bytes have no meaning there."""
    try:
        return str(data, "utf-8")
    except UnicodeDecodeError:
        raise TensorError(
            f"input {shown(name)}: element {k} is not valid UTF-8; BYTES takes text"
            " (send other bytes as base64)"
        ) from None


def read_one_text(data: bytes, shape: tuple[int, ...], name: str) -> Array:
    """The bytes as the only element of a BYTES tensor."""
    if any(size != 1 for size in shape):
        raise TensorError(
            f"input {shown(name)}: a body without JSON is one element, shape {list(shape)} has not"
        )
    array: Array = np.empty(1, np.object_)
    array[0] = text(data, 0, name)
    return array.reshape(shape)
