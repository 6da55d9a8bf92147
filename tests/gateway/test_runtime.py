"""What a session finds out about its model, on real ONNX files."""

import re
from pathlib import Path

import numpy as np
import pytest

from gateway import runtime
from gateway.config import BatchConfig, RuntimeConfig
from gateway.errors import InputRefusedError, VersionRefusedError
from gateway.runtime import Session, Trial
from tests import models

EVERY_KIND = (
    "BOOL", "UINT8", "UINT16", "UINT32", "UINT64", "INT8", "INT16", "INT32", "INT64",
    "FP16", "FP32", "FP64", "BYTES",
)  # fmt: skip


def session(directory: Path, content: bytes) -> Session:
    file = directory / "model.onnx"
    file.write_bytes(content)
    return Session(file, RuntimeConfig())


def trial(directory: Path, content: bytes, **batch: int) -> Trial:
    return session(directory, content).try_out(BatchConfig(**batch), RuntimeConfig())


@pytest.mark.parametrize("kind", EVERY_KIND)
def test_a_model_of_every_datatype_is_tried_out(tmp_path: Path, kind: str) -> None:
    """Made-up input exists for every datatype, and rows of an identity are independent."""
    found = trial(tmp_path, models.identity(kind))

    assert found.can_batch, found.reason
    assert set(found.run_s) == {1, 8, 64}


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (models.fixed_rows(), "free first axis"),
        (models.vector(), "free first axis"),
        (models.scalar(), "free first axis"),
        (models.centred(), "depends on the other rows"),
        (models.mean_of_rows(), "free first axis|one row for each"),
        (models.even_rows(), "one row|fails"),
        (models.four_rows_at_most(), "fails on a fuller batch"),
    ],
    ids=["fixed rows", "vector", "scalar", "centred", "mean", "even rows", "four at most"],
)
def test_what_cannot_be_batched_is_found_out_by_itself(
    tmp_path: Path, content: bytes, reason: str
) -> None:
    """No setting says so: shapes, and answers of rows alone and together, do."""
    found = trial(tmp_path, content)

    assert not found.can_batch
    assert re.search(reason, found.reason), found.reason
    assert found.run_s


def test_a_light_model_runs_inline_and_a_slow_one_on_a_thread(tmp_path: Path) -> None:
    """The choice is measured: a fullest batch below 100 us, or tens of milliseconds."""
    light = trial(tmp_path, models.identity())
    slow = trial(tmp_path, models.slow())

    assert max(light.run_s) == 64
    assert light.is_inline == (light.run_s[64] < 1e-4)
    assert not slow.is_inline
    assert slow.run_s[1] > 1e-3


def test_a_model_too_slow_for_a_trial_of_eight_rows_is_tried_with_two(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its rows are as cheap together as those of a faster one: that is seen, not given up."""
    opened = session(tmp_path, models.slow())
    one_s = opened.try_out(BatchConfig(), RuntimeConfig()).run_s[1]

    monkeypatch.setattr(runtime, "_TRIAL_S_MAX", 3 * one_s)
    tried = opened.try_out(BatchConfig(), RuntimeConfig())
    monkeypatch.setattr(runtime, "_TRIAL_S_MAX", one_s / 9)
    untried = opened.try_out(BatchConfig(), RuntimeConfig())
    alone = opened.try_out(BatchConfig(rows_max=1), RuntimeConfig())
    of_two = opened.try_out(BatchConfig(rows_max=2), RuntimeConfig())

    assert tried.can_batch, tried
    assert 2 in tried.run_s
    assert not untried.can_batch
    assert re.fullmatch(r"a row takes \S+ s: too long to try several together", untried.reason)
    assert alone.can_batch
    assert set(alone.run_s) == set(of_two.run_s) == {1}


def test_nothing_runs_inline_when_told_so(tmp_path: Path) -> None:
    """runtime.inline_s_max = 0 keeps every model off the loop."""
    found = session(tmp_path, models.identity()).try_out(
        BatchConfig(), RuntimeConfig(inline_s_max=0)
    )

    assert not found.is_inline


def test_lookup_with_indices_is_warmed_with_small_ones(tmp_path: Path) -> None:
    """A table of five rows accepts the made-up indices 0 and 1; others are refused, no failure."""
    opened = session(tmp_path, models.lookup())
    found = opened.try_out(BatchConfig(), RuntimeConfig())

    assert found.can_batch
    kind = opened.signature.inputs[0]
    wrong = np.full([1 if n < 0 else n for n in kind.shape], 99, dtype=np.int64)
    with pytest.raises(InputRefusedError, match="Gather"):
        opened.run([wrong])


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "file|parsing|graph|empty"),
        (b"this is no model", "parsing|protobuf"),
        (models.identity()[:-20], "parsing|protobuf"),
        (models.classifier_with_zipmap(), "zipmap off"),
        (models.with_lost_weights(), "external|exist|file"),
    ],
    ids=["empty", "text", "truncated", "zipmap", "lost weights"],
)
def test_a_file_that_cannot_be_served_is_refused_in_words(
    tmp_path: Path, content: bytes, words: str
) -> None:
    """The reason is onnxruntime's or ours, without a path of the machine."""
    with pytest.raises(VersionRefusedError) as refused:
        session(tmp_path, content)

    text = str(refused.value)
    assert re.search(words, text.lower()), text
    assert str(tmp_path) not in text
    assert "/" not in text


def test_the_trial_is_the_same_on_a_shared_machine(tmp_path: Path) -> None:
    """Whether rows may share a run depends on answers only, never on time."""
    assert {trial(tmp_path, models.identity()).can_batch for _ in range(5)} == {True}
