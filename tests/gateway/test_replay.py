"""Captured requests through two versions: differences as numpy counts them, and what guards say."""

import itertools
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gateway.capture.record import Record, TensorKept, Unit, kept
from gateway.columns import columns_of, fit
from gateway.config import RuntimeConfig
from gateway.decision import guards_of
from gateway.replay import Report, Side, replay
from gateway.runtime import Session
from gateway.shadow import places_of
from gateway.shadow.tally import Pairing
from gateway.tensors import Array
from monitors import Profile
from monitors.guards.verdict import Guard
from registry.rollouts import Plan, Rollout
from registry.routes import Shadow, Tolerance
from registry.signature import Signature, TensorSpec
from tests import models
from tests.gateway.capture.records import record

GUARDS = guards_of(Rollout(id="", candidate=0, control=0, phase="step", plan=Plan()))
X = TensorSpec("x", "FP32", (-1,))


def opened(tmp_path: Path, version: int, content: bytes) -> Side:
    """A version of m from a real model file."""
    file = models.put(tmp_path, "m", version, content) / "model.onnx"
    return Side("m", version, f"sha256:{version}", Session(file, RuntimeConfig()))


def asked(
    k: int, x: Array, y: Array | None = None, *, by: int = 1, spec: TensorSpec = X, **more: Any
) -> Record:
    """A captured request, answered by a version if there is an answer."""
    out = TensorSpec("y", "FP32", (-1,))
    return record(
        k,
        rows=len(x),
        digest=f"sha256:{by}",
        version=by,
        inputs=kept([spec], [x]),
        outputs=None if y is None else kept([out], [y]),
        **more,
    )


def replayed(records: Sequence[Record], target: Side, against: Side, **how: Any) -> Report:
    """With a rollout's own guards and level."""
    return replay(
        records, target, against, GUARDS, **{"alpha": 0.01, "disagreement_max": 2.0, **how}
    )


def fired(report: Report) -> list[str]:
    """Guards that would have."""
    assert report.judged is not None
    return [finding.name for finding in report.judged.findings if finding.is_breach]


def test_differences_are_those_that_numpy_counts(tmp_path: Path) -> None:
    """x and x + 0.25 on 60 requests of 1 to 7 rows: every count, mean, quantile and largest one."""
    draw = np.random.default_rng(3)
    inputs = [
        draw.normal(scale=300, size=(draw.integers(1, 8), 1)).astype(np.float32) for _ in range(60)
    ]
    old, new = opened(tmp_path, 1, models.plus(0)), opened(tmp_path, 2, models.plus(0.25))

    document = replayed([asked(k, x) for k, x in enumerate(inputs)], new, old).document()

    x = np.concatenate(inputs).ravel()
    apart = np.abs((x + np.float32(0.25)).astype(np.float64) - x.astype(np.float64))
    differs = apart > 1e-6 + 1e-3 * np.abs(x.astype(np.float64))
    assert 20 < differs.sum() < len(x) - 20
    output = document["outputs"]["y"]
    assert document["requests"] == {"compared": 60, "failed": 0}
    assert document["rows"] == {"compared": len(x), "differ": differs.sum()}
    assert output["rows_differ"] == differs.sum()
    assert output["largest"] == apart.max()
    assert output["mean"] == pytest.approx(apart.mean())
    assert output["quantiles"]["90"] == pytest.approx(np.quantile(apart, 0.9))
    spans = list(itertools.pairwise(np.cumsum([0, *map(len, inputs)])))
    worst = {
        f"r-{k}/{np.argmax(np.where(differs[s:e], apart[s:e], -1))}"
        for k, (s, e) in enumerate(spans)
        if differs[s:e].any()
    }
    assert {each["prediction"] for each in output["worst"]} <= worst
    assert [side["run"] for side in document["ran"].values()] == [60, 60]
    # One row of each request is a case of its own: 0.25 on average, as far as float32 has it.
    apart = document["differences"]["y"]
    assert apart["units"] == 60
    assert apart["mean"] == pytest.approx(0.25, abs=1e-4)
    assert fired(replayed([asked(k, x) for k, x in enumerate(inputs)], new, old)) == [
        "disagreement"
    ]


def test_equal_versions_agree_and_what_was_captured_is_not_run_again(tmp_path: Path) -> None:
    """The same function in other files: nothing differs; answers of just these files are taken."""
    draw = np.random.default_rng(4)
    inputs = [draw.normal(size=(3, 1)).astype(np.float32) for _ in range(300)]
    old, new = (
        opened(tmp_path, 1, models.plus(0)),
        opened(tmp_path, 2, models.identity(shape=("n", 1))),
    )
    records = [asked(k, x, x) for k, x in enumerate(inputs)]

    report = replayed(records, new, old, units_min=200)

    assert (report.pairs.rows_differ, report.outputs["y"].largest) == (0, 0.0)
    assert (old.n_run, old.n_captured, new.n_run, new.n_captured) == (0, 300, 300, 0)
    assert report.judged is not None
    assert (report.judged.kind, fired(report), report.is_breach) == ("ok", [], False)
    few = replayed(records[:150], new, old, units_min=200)
    assert few.judged is not None
    assert (few.judged.kind, few.is_breach) == ("inconclusive", False)

    lied = [asked(k, x, x + 9) for k, x in enumerate(inputs[:5])]
    assert replayed(lied, new, old).pairs.rows_differ == 15, (
        "captured answers are taken as they are"
    )
    other = [asked(k, x, x + 9, by=3) for k, x in enumerate(inputs[:5])]
    assert replayed(other, new, old).pairs.rows_differ == 0, "of other files they say nothing"


def test_tolerances_are_the_callers(tmp_path: Path) -> None:
    """A quarter is nothing to some, and a threshold looks at the side only."""
    inputs = np.array([[0.1], [0.4], [0.6]], np.float32)
    old, new = opened(tmp_path, 1, models.plus(0)), opened(tmp_path, 2, models.plus(0.25))
    for tolerance, n in (
        (Tolerance(atol=0.3, rtol=0), 0),
        (Tolerance(atol=0.2, rtol=0), 3),
        (Tolerance(threshold=0.5), 1),
    ):
        report = replayed([asked(0, inputs)], new, old, tolerances={"y": tolerance})
        assert report.pairs.rows_differ == n


def test_errors_and_outputs_that_are_not_finite_are_breaches(tmp_path: Path) -> None:
    """An index out of range fails one version alone, and a NaN where the other has none."""
    rows = [np.array([k % 8], np.int64) for k in range(200)]  # 5, 6 and 7 are beyond its table
    new = opened(tmp_path, 1, models.lookup())
    spec = new.session.signature.inputs[0]
    old = Side("m", 2, "sha256:2", Answering(lambda x: x, new.session.signature))
    records = [asked(k, x, spec=spec) for k, x in enumerate(rows)]

    report = replayed(records, new, old)

    assert report.errors == {"target": 75}
    assert len(report.examples) == 5
    assert "r-5: " in report.examples[0]
    assert {"error_rate", "errors_alone"} <= {*fired(report)}
    assert report.is_breach
    assert "errors_alone" not in fired(replayed(records, old, new))

    nan = opened(tmp_path, 3, models.constant(math.nan))
    one = opened(tmp_path, 4, models.constant(1))
    few = [asked(k, np.zeros(1, np.float32)) for k in range(3)]
    report = replayed(few, nan, one)
    assert report.judged is not None
    assert report.is_breach
    assert "not finite: 3" in report.judged.reason
    assert report.document()["outputs"]["y"]["largest"] is None
    assert not replayed(few, nan, opened(tmp_path, 5, models.constant(math.nan))).is_breach


def test_what_cannot_be_run_is_left_out_and_said(tmp_path: Path) -> None:
    """No inputs, or bytes that are no tensor; a version that takes others is at fault itself."""
    old, new = opened(tmp_path, 1, models.plus(0)), opened(tmp_path, 2, models.plus(0))
    x = np.ones((2, 1), np.float32)
    bare = record(1, rows=2)
    broken = record(2, rows=2, inputs=(TensorKept("x", "FP32", (3,), b"1234"),))
    other = record(3, rows=2, model="n", inputs=kept([X], [x]))

    report = replayed([asked(0, x), bare, broken, other], new, old)
    assert report.requests == 1
    assert sorted(report.left_out.values()) == [1, 1]
    assert "its inputs were not captured" in report.left_out

    redacted = record(4, rows=2, inputs=(), digest="sha256:1", outputs=kept([X], [x]))
    report = replayed([redacted], new, old)
    assert (report.requests, dict(report.left_out)) == (0, {"input 'x' was not captured": 1})

    two = opened(tmp_path, 3, models.sum_and_difference())
    report = replayed([asked(0, x)], two, old)
    assert report.errors == {"target": 1}
    assert "'x'" in report.examples[0]


def test_units_count_once() -> None:
    """A thousand requests of one user are one case; rows are all counted."""
    signature = Signature((X,), (TensorSpec("y", "FP32", (-1,)),))
    old = Side("m", 1, "a", Answering(lambda x: x, signature))
    new = Side("m", 2, "b", Answering(lambda x: x + 1, signature))
    one = (Unit("header:x-user", 5, "abcd"),)
    records = [asked(k, np.ones(2, np.float32), units=one) for k in range(1000)]

    report = replayed(records, new, old)

    assert (report.pairs.rows, report.pairs.rows_differ) == (2000, 2000)
    finding = next(f for f in report.judged.findings if f.name == "disagreement")
    assert finding.candidate == (1, 1)
    assert fired(report) == []


class Answering:
    """A session that computes."""

    def __init__(self, function: Callable[[Array], Array], signature: Signature) -> None:
        self.signature = signature
        self._function = function

    def run(self, arrays: Sequence[Array]) -> list[Array]:
        return [self._function(arrays[0])]


def test_disagreement_is_the_evidence_of_its_formula() -> None:
    """The mean over shares above 2 percent of likelihood ratios, written out here once more."""
    signature = Signature((X,), (TensorSpec("y", "FP32", (-1,)),))
    old = Side("m", 1, "a", Answering(lambda x: x, signature))
    new = Side("m", 2, "b", Answering(lambda x: x + (x > 95), signature))
    records = [asked(k, np.array([k % 100], np.float32)) for k in range(300)]

    finding = next(
        f for f in replayed(records, new, old).judged.findings if f.name == "disagreement"
    )

    shares = sorted({min(0.02 * t, 0.51) for t in (1.25, 1.5, 2, 3, 5, 10, 20)})
    ratios = [(s / 0.02) ** 12 * ((1 - s) / 0.98) ** 288 for s in shares]
    assert finding.candidate == (12, 300)
    assert finding.log_evidence == pytest.approx(math.log(np.mean(ratios)))


def test_a_shift_fires_and_equal_laws_do_not() -> None:
    """Scores of another mean are found by 400 units; of 80 replays of versions that differ by
    noise alone, with tolerances that mind nothing, no more than a few fire at a level of 1 %.
    """
    signature = Signature((X,), (TensorSpec("y", "FP32", (-1,)),))
    lenient = {"y": Tolerance(atol=100, rtol=0)}
    draw = np.random.default_rng(11)

    def noisy(shift: float) -> Side:
        return Side(
            "m", 1, "a",
            Answering(
                lambda x: (shift + draw.normal(size=len(x))).astype(np.float32), signature
            ),
        )  # fmt: skip

    def run(shift: float, start: int, n: int) -> list[str]:
        records = [asked(k, np.ones(1, np.float32)) for k in range(start, start + n)]
        return fired(replayed(records, noisy(shift), noisy(0.0), tolerances=lenient))

    assert run(1.0, 0, 400) == ["output_shift"]
    false = sum(bool(run(0.0, 1000 * k, 220)) for k in range(1, 81))
    assert false <= 4


def test_classes_shift_too() -> None:
    """Whole numbers and texts are compared class by class."""
    for kind, values in (("INT64", (0, 1)), ("BYTES", ("no", "yes"))):
        signature = Signature((X,), (TensorSpec("label", kind, (-1,)),))
        dtype = np.int64 if kind == "INT64" else object

        def always(which: int, values: Any = values, dtype: Any = dtype) -> Callable[..., Array]:
            return lambda x: np.array([values[which if v > 0.5 else 0] for v in x], dtype)

        old = Side("m", 1, "a", Answering(always(0), signature))
        new = Side("m", 2, "b", Answering(always(1), signature))
        records = [asked(k, np.array([k % 2], np.float32)) for k in range(300)]
        assert "output_shift" in fired(replayed(records, new, old, disagreement_max=99.0)), kind


def test_only_guards_that_pairs_inform_are_asked() -> None:
    """Durations, inputs and shares of a replay are not those of a server."""
    signature = Signature((X,), (TensorSpec("y", "FP32", (-1,)),))
    old = Side("m", 1, "a", Answering(lambda x: x, signature))
    report = replay(
        [asked(0, np.ones(1, np.float32))], old, old,
        [*GUARDS, Guard(name="p99", kind="ceiling", event="late", share_max=0.01)],
        alpha=0.01, disagreement_max=2.0,
    )  # fmt: skip
    names = [finding.name for finding in report.judged.findings]
    assert names == ["error_rate", "not_finite", "output_shift", "disagreement", "errors_alone"]
    bounds = {round(math.exp(finding.log_bound)) for finding in report.judged.findings}
    assert bounds == {500}  # five share one percent


def test_the_worst_bins_are_where_the_versions_differ() -> None:
    """A version that differs above 1 only: the upper bins of its input, with their rows."""
    signature = Signature((X,), (TensorSpec("y", "FP32", (-1,)),))
    x = np.random.default_rng(5).normal(size=2000).astype(np.float32)
    profile = Profile.fit({"input:x": x, "output:y": x})
    columns, _ = fit(profile, columns_of(signature)[0], signature)
    pairing = Pairing("m", "2", 2, 1, Shadow(to=2))
    places = places_of(lambda *_: (columns, profile), pairing)
    old = Side("m", 1, "a", Answering(lambda x: x, signature), places)
    new = Side("m", 2, "b", Answering(lambda x: x + (x > 1), signature))
    records = [asked(k, part) for k, part in enumerate(np.split(x, 100))]

    document = replayed(records, new, old).document()

    worst = document["worst_bins"]
    assert {each["channel"] for each in worst} == {"input:x"}
    assert sum(each["differ"] for each in worst) == (x > 1).sum() == document["rows"]["differ"]
    assert max(each["share"] for each in worst) == 1.0
