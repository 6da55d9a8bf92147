"""Agreement of two answers, against the definition written out number by number."""

import math

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from gateway.comparison import compare
from gateway.tensors import BFLOAT16, narrowed
from registry.routes import Tolerance

FLOATS = st.floats(width=32) | st.sampled_from([0.0, 1.0, 1.001, 0.999, math.inf, -math.inf])


def agrees(a: float, b: float, tolerance: Tolerance) -> bool:
    """What docs/reference/route-format.md says of two numbers."""
    if math.isnan(a) or math.isnan(b):
        return math.isnan(a) and math.isnan(b)
    if tolerance.threshold is not None:
        return (a >= tolerance.threshold) == (b >= tolerance.threshold)
    if math.isinf(a) or math.isinf(b):
        return a == b
    return abs(b - a) <= tolerance.atol + tolerance.rtol * abs(a)


@settings(max_examples=150, deadline=None)
@given(
    pairs=st.lists(st.tuples(FLOATS, FLOATS), min_size=1, max_size=6),
    tolerance=st.sampled_from(
        [
            Tolerance(),
            Tolerance(atol=0.5, rtol=0),
            Tolerance(atol=0, rtol=0.25),
            Tolerance(atol=0, rtol=0),
            Tolerance(threshold=0.5),
        ]
    ),
)
@example(pairs=[(math.inf, 5.0), (5.0, math.inf), (math.nan, 5.0)], tolerance=Tolerance())
def test_numbers_agree_as_defined(pairs: list[tuple[float, float]], tolerance: Tolerance) -> None:
    """|b - a| <= atol + rtol |a|, or the same side of a threshold; NaN and infinities as said."""
    one, other = (np.array(side, np.float32) for side in zip(*pairs, strict=True))

    found = compare({"y": one}, {"y": other}, len(pairs), {"y": tolerance})

    wanted = [not agrees(float(a), float(b), tolerance) for a, b in zip(one, other, strict=True)]
    assert found.differs.tolist() == wanted
    assert found.is_agreed is not any(wanted)


@settings(max_examples=100, deadline=None)
@given(data=st.data())
def test_whole_numbers_agree_when_they_are_equal(data: st.DataObject) -> None:
    """Classes 1000 and 1001 are two classes; distances are exact at both ends of every type."""
    dtype = data.draw(st.sampled_from(["i1", "i8", "u8", "u2"]))
    values = hnp.arrays(dtype, 4, elements=hnp.from_dtype(np.dtype(dtype)))
    one, other = data.draw(values), data.draw(values)

    found = compare({"y": one}, {"y": other}, 4)

    exact = [abs(int(b) - int(a)) for a, b in zip(one, other, strict=True)]
    assert found.differs.tolist() == [distance > 0 for distance in exact]
    assert found.outputs["y"].distance.tolist() == [float(distance) for distance in exact]
    wide = compare({"y": one}, {"y": other}, 4, {"y": Tolerance(atol=2.0**64, rtol=0)})
    assert wide.is_agreed


def test_rows_are_told_apart_and_whole_outputs_count_for_all() -> None:
    """A row disagrees if any of its values in any output does."""
    first = {"p": np.zeros((3, 2)), "label": np.array(["a", "b", "c"], object), "n": np.array(1)}
    second = {**first, "p": np.array([[0, 0], [0, 0.25], [0, 0]])}

    found = compare(first, second, 3)
    assert found.differs.tolist() == [False, True, False]
    assert found.outputs["p"].distance.tolist() == [0, 0.25, 0]

    second["label"] = np.array(["a", "b", "x"], object)
    found = compare(first, second, 3)
    assert found.differs.tolist() == [False, True, True]
    assert found.outputs["label"].distance.tolist() == [0, 0, math.inf]

    second["n"] = np.array(2)
    assert compare(first, second, 3).differs.tolist() == [True, True, True]


@pytest.mark.parametrize(
    ("other", "problem"),
    [
        (None, "no such output"),
        (np.zeros((2, 2)), "shape [2] against [2, 2]"),
        (np.array(["a", "b"], object), "FP64 against BYTES"),
    ],
)
def test_what_cannot_be_compared_disagrees(other: np.ndarray | None, problem: str) -> None:
    """And says why."""
    second = {} if other is None else {"y": other}

    found = compare({"y": np.zeros(2)}, second, 2)

    assert found.differs.tolist() == [True, True]
    assert problem in found.outputs["y"].problem


def test_other_widths_compare_by_value() -> None:
    """A version in half precision is held against one in full."""
    full = np.array([0.5, 300.0], np.float32)
    assert compare({"y": full}, {"y": full.astype(np.float16)}, 2).is_agreed
    assert compare({"y": narrowed(full)}, {"y": full.astype(np.float64)}, 2).is_agreed
    assert narrowed(full).dtype == BFLOAT16
    assert compare({"y": np.array([7], np.int64)}, {"y": np.array([7], np.uint8)}, 1).is_agreed
    far = compare({"y": np.array([-(2**63)])}, {"y": np.array([2**64 - 1], np.uint64)}, 1)
    assert far.outputs["y"].distance.tolist() == [float(2**63 + 2**64 - 1)]


def test_no_rows_disagree_about_nothing() -> None:
    """An empty answer agrees with an empty answer."""
    assert compare({"y": np.zeros((0, 3))}, {"y": np.zeros((0, 3))}, 0).is_agreed
