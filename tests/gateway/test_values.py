"""Bins of first values: numbers by the champion's deciles, classes by its levels."""

import json
from random import Random

import numpy as np
import pytest

from gateway import values
from gateway.values import MISSING, Bins, Frozen
from tests.rollouts import Rig

PLAN = {"steps": [{"weight": 50, "for_s": 500, "units_min": 50}]}


def text(value):
    return np.array([[value]], np.object_)


def probabilities(winner):
    row = np.full((1, 4), 0.1)
    row[0, winner] = 0.7
    return row


ANSWERS = {
    "whole numbers": lambda k: np.array([[k]], np.int64),
    "texts": lambda k: text(f"class {k}"),
    "bytes": lambda k: text(b"class %d" % k),
    "probabilities": probabilities,
    "scores": lambda k: np.array([[k / 4]]),
}


class Answering(Rig):
    """Answers are one of a few classes."""

    as_answer = staticmethod(ANSWERS["texts"])

    def answer(self, score):
        return self.as_answer(score)


@pytest.fixture
def rig(tmp_path):
    it = Answering(tmp_path, PLAN)
    yield it
    it.controller.close()


def draws(usual, other):
    """The candidate's classes as often as `other` says, the champion's as `usual` does."""
    return lambda rng, c: (0.01, False, rng.choices(range(4), other if c else usual)[0])


@pytest.mark.parametrize("kind", ANSWERS)
def test_classes_that_are_given_more_often_are_a_shift_and_equal_ones_are_none(rig, kind) -> None:
    """Whatever they are written in."""
    rig.as_answer = ANSWERS[kind]
    for _ in range(12):
        rig.second(requests=100, behave=draws((5, 3, 1, 0), (5, 3, 1, 0)))
    assert rig.rollout.phase == "step"
    assert not any(guard["breach"] for guard in rig.status()["guards"])

    held = rig.until("holding", requests=100, behave=draws((5, 3, 1, 0), (3, 5, 1, 0)))

    assert "output_shift" in held.reason


@pytest.mark.parametrize("kind", ["whole numbers", "texts", "probabilities"])
def test_a_class_that_the_champion_never_gave_has_a_bin_of_its_own(rig, kind) -> None:
    """One answer in five of the candidate's is new."""
    rig.as_answer = ANSWERS[kind]
    assert rig.until(
        "holding", requests=100, behave=draws((5, 3, 0, 0), (4, 2.4, 0, 1.6))
    ).cause == "breach"  # fmt: skip


def test_of_texts_no_revision_and_no_file_holds_more_than_a_hash(rig) -> None:
    """Revisions are kept for ever; evidence lies in the directory that hosts share."""
    for _ in range(6):
        rig.second(requests=100, behave=draws((5, 3, 1, 1), (5, 3, 1, 1)))

    levels = rig.rollout.levels["output:score[0]"]
    assert len(levels) == 4
    assert all(level.startswith("#") and len(level) == 13 for level in levels)
    for path in rig.state_dir.rglob("*.json"):
        assert b"class 0" not in path.read_bytes()
    evidence = rig.state_dir / "rollouts" / rig.rollout.id / "evidence"
    for path in evidence.iterdir():
        assert json.loads(path.read_bytes())["samples"] == {}


def test_bins_are_few_whatever_comes() -> None:
    """Thirty-two levels and one more; many numbers by deciles; free texts are no classes."""
    random = Random(1)
    samples = {
        "output:many[0]": [random.randrange(30) for _ in range(400)],
        "output:counts[0]": [random.randrange(1000) for _ in range(400)],
        "output:words[0]": [f"#{random.randrange(60)}" for _ in range(400)],
        "output:prose[0]": [f"#{k}" for k in range(400)],
        "output:score[0]": [random.random() for _ in range(400)],
    }

    frozen = values.freeze([samples])
    bins = Bins(frozen)

    assert set(frozen.levels) == {"output:many[0]", "output:words[0]"}
    assert set(frozen.edges) == {"output:counts[0]", "output:score[0]"}
    assert [bins.n(name) for name in bins.names] == [10, 10, 31, 33]
    assert values.freeze([{"output:score[0]": [0.1] * 199}]) == Frozen({}, {})
    # Any order of workers gives the same bins.
    halves = [{k: v[:200] for k, v in samples.items()}, {k: v[200:] for k, v in samples.items()}]
    assert values.freeze(halves) == values.freeze(halves[::-1]) == frozen


def test_values_that_are_missing_or_of_another_kind_have_no_bin_of_others() -> None:
    """Numbers that are not finite are none; a text where numbers were is missing."""
    bins = Bins(Frozen({"output:y[0]": (1.0, 2.0)}, {"output:c[0]": ("1", "2")}))

    assert bins.of({"output:y[0]": 1.5, "output:c[0]": 2}) == [1, 1]
    assert bins.of({"output:y[0]": "#ab", "output:c[0]": 7}) == [MISSING, 2]
    assert bins.of({}) == [MISSING, MISSING]
    wanted = values.channels("output:", [np.array([[np.nan, 1.5]])], ["y"])
    assert values.read(wanted, [np.array([[np.nan, 1.5]])]) == {"output:y[1]": 1.5}
    assert values.read(wanted, [np.zeros((0, 2))]) == {}
