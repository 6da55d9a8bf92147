"""Which shapes a tensor of a signature takes."""

from hypothesis import given
from hypothesis import strategies as st

from registry.signature import Signature, TensorSpec

SIZES = st.lists(st.integers(0, 4), max_size=4)


@given(SIZES, st.lists(st.integers(-1, 4), max_size=4))
def test_a_shape_fits_when_every_fixed_axis_agrees(got: list[int], want: list[int]) -> None:
    """Same rank, and each axis free or equal: compared with the definition written out."""
    spec = TensorSpec("x", "FP32", tuple(want))

    expected = len(got) == len(want) and not any(
        w not in (-1, g) for w, g in zip(want, got, strict=False)
    )

    assert spec.fits(tuple(got)) is expected


def test_rows_can_be_counted_only_where_every_tensor_starts_free() -> None:
    """One fixed first axis, or a scalar, is enough to say no."""
    free, fixed, scalar = (TensorSpec("x", "FP32", shape) for shape in ((-1, 3), (4, 3), ()))

    assert Signature((free,), (free,)).has_row_axis
    assert not Signature((free, fixed), (free,)).has_row_axis
    assert not Signature((free,), (scalar,)).has_row_axis
