"""One array per datatype of the protocol, with the values that an encoding loses first."""

import numpy as np

INTEGERS = ("UINT8", "UINT16", "UINT32", "UINT64", "INT8", "INT16", "INT32", "INT64")
FLOATS = {"FP16": np.float16, "FP32": np.float32, "FP64": np.float64}
KINDS = ("BOOL", *INTEGERS, *FLOATS, "BYTES")
TEXTS = ["", "plain", "Grüße, 世界", 'quote " and \\', "a" * 300]


def array(kind: str, *, is_finite: bool = False) -> np.ndarray:
    """Ends of the range, and for floats also NaN and infinities unless `is_finite`."""
    if kind == "BOOL":
        return np.array([True, False, True])
    if kind == "BYTES":
        return np.array([text.encode() for text in TEXTS], dtype=object)
    if kind in FLOATS:
        limits = np.finfo(FLOATS[kind])
        special = [] if is_finite else [np.nan, np.inf, -np.inf]
        values = [0.0, -0.0, 0.1, limits.max, limits.min, limits.tiny, *special]
        return np.array(values, dtype=FLOATS[kind])
    dtype = np.dtype(kind.lower())
    limits = np.iinfo(dtype)
    return np.array([limits.min, limits.max, 0, 1], dtype=dtype)


def assert_same(got: np.ndarray, sent: np.ndarray) -> None:
    """Bit for bit for numbers; texts as UTF-8 bytes, whether they came as text or as bytes."""
    assert got.shape == sent.shape
    if sent.dtype == np.object_:
        as_bytes = [x.encode() if isinstance(x, str) else bytes(x) for x in got.ravel()]
        assert as_bytes == list(sent.ravel())
    else:
        assert got.dtype == sent.dtype
        assert got.tobytes() == sent.tobytes()
