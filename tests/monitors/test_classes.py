"""Classes and confidence of rows of probabilities."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from monitors.classes import are_labels, are_probabilities, classes, confidence, named


def softmax(scores: np.ndarray) -> np.ndarray:
    exps = np.exp(scores - scores.max(axis=1, keepdims=True))
    return exps / exps.sum(axis=1, keepdims=True)


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
@given(st.integers(2, 200), st.integers(1, 30), st.integers(0, 10))
def test_probabilities_are_known_in_every_precision(dtype, n_classes, n_rows, seed) -> None:
    """A softmax is one, also rounded; its scores before it are none."""
    scores = np.random.default_rng(seed).normal(size=(n_rows, n_classes)) * 3
    rows = softmax(scores).astype(dtype)

    assert are_probabilities(rows)
    assert not are_probabilities(scores.astype(dtype) - 10)
    assert classes(rows).tolist() == [str(k) for k in rows.argmax(axis=1)]
    assert confidence(rows).dtype == dtype
    np.testing.assert_array_equal(confidence(rows), rows.max(axis=1))


def test_what_is_no_probability_is_told_apart() -> None:
    """One column, other sums, negative parts, whole numbers, nothing finite, nothing at all."""
    half = np.full((4, 2), 0.5)

    assert are_probabilities(half)
    assert are_probabilities(np.vstack([half, [[np.nan, 0.1]]]))
    for other in (half[:, :1], half * 1.1, half - np.float64([-1, 1]), np.eye(2, dtype=np.int64),
                  np.full((2, 2), np.nan), half[:0], half[0]):  # fmt: skip
        assert not are_probabilities(other)


def test_a_row_without_a_number_has_no_class() -> None:
    """Missing, whichever of its columns lacks; the first of equal ones counts."""
    rows = np.array([[0.5, 0.5], [np.nan, 1.0], [0.1, np.nan], [0.1, 0.9]], np.float32)

    assert classes(rows).tolist() == ["0", None, None, "1"]
    assert np.isnan(confidence(rows)).tolist() == [False, True, True, False]
    assert classes(rows, ("no", "yes")).tolist() == ["no", None, None, "yes"]
    assert classes(rows[:0]).size == confidence(rows[:0]).size == 0


def test_labels_are_few_whole_numbers() -> None:
    """Their names are the numbers, also beyond 64 bits of sign."""
    assert are_labels(np.array([3, 1, 3], np.uint8))
    assert not are_labels(np.arange(51))
    assert not are_labels(np.array([0.0, 1.0]))
    assert named(np.array([2**64 - 1, 0], np.uint64)).tolist() == [str(2**64 - 1), "0"]
    assert named(np.zeros(0, np.int64)).size == 0
