"""What of an answer a label is compared with."""

import pytest

from gateway.errors import ConfigError
from gateway.labels.target import Target, of
from registry.signature import Signature, TensorSpec


def signature(**outputs: tuple[str, tuple[int, ...]]) -> Signature:
    specs = (TensorSpec(name, kind, shape) for name, (kind, shape) in outputs.items())
    return Signature((TensorSpec("x", "FP32", (-1,)),), tuple(specs))


@pytest.mark.parametrize(
    ("outputs", "expected"),
    [
        ({"label": ("INT64", (-1,)), "score": ("FP32", (-1, 1))}, Target("score")),
        ({"label": ("INT64", (-1,)), "p": ("FP32", (-1, 2))}, Target("p", column=1)),
        ({"label": ("INT64", (-1,)), "p": ("FP32", (-1, 5))}, Target("p", task="multiclass")),
        ({"w": ("BYTES", (-1,))}, Target("w", task="multiclass", takes_text=True)),
        ({"n": ("INT64", (-1,))}, Target("n", task="multiclass")),
        ({"image": ("FP32", (-1, -1, -1))}, None),
        ({"one": ("FP32", (1,))}, None),
    ],
)
def test_the_score_is_found_among_outputs(
    outputs: dict[str, tuple[str, tuple[int, ...]]], expected: Target | None
) -> None:
    """A float a row before two before many before a class; nothing that has no rows."""
    assert of(signature(**outputs)) == expected


def test_a_declared_target_counts_and_a_wrong_one_is_named() -> None:
    """Output, column and task as declared; a wrong one says what there is."""
    given = signature(score=("FP32", (-1,)), p=("FP32", (-1, 3)))

    assert of(given, {"output": "p", "column": 2, "task": "binary"}) == Target("p", 2, "binary")
    for wrong, said in [
        ({"output": "scor"}, "did you mean 'score'"),
        ({"output": "p", "column": 3}, "has 3 columns"),
        ({"output": "p", "task": "ranking"}, "must be one of"),
        ({"outputs": "p"}, "no such field"),
    ]:
        with pytest.raises(ConfigError, match=said):
            of(given, wrong)


def test_the_value_of_a_row_is_a_number_a_text_or_probabilities() -> None:
    """A column of one is a number; a declared column is taken; a missing one is nothing."""
    outputs = {"score": [0.25], "p": [0.1, 0.9], "w": "a"}

    assert Target("score").value(outputs) == 0.25
    assert Target("p").value(outputs) == [0.1, 0.9]
    assert Target("p", column=1).value(outputs) == 0.9
    assert Target("p", column=2).value(outputs) is None
    assert Target("w").value(outputs) == "a"
    assert Target("gone").value(outputs) is None
