"""What the demo reckons and says: numbers against theory, sentences against numbers."""

import dataclasses
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import mannwhitneyu, norm

from gateway.demo import replay, story
from gateway.demo.months import Alarm, Month, auc, auc_error, name_of
from gateway.demo.screen import WIDTH, Screen

CHANNELS = ("input:temp", "input:dewp", "input:distance", "input:carrier", "output:probability")


def month(number: int, *, temp: float = 0.01, area: float = 0.75, late: float = 0.2) -> Month:
    """A month in which nothing happens but what is said."""
    return Month(
        number=number,
        n_flights=2000,
        late_rate=late,
        score_mean=0.2,
        auc=area,
        auc_error=0.03,
        psi=dict.fromkeys(CHANNELS, 0.01) | {"input:temp": temp},
        lines=dict.fromkeys(CHANNELS, 0.02),
        alarms=(Alarm("input:temp", temp, 0.02, number - 1),) if temp >= 0.25 else (),
    )


def year(**changes: Month) -> list[Month]:
    """Twelve months; `m7=month(7, ...)` replaces July."""
    return [changes.get(f"m{number}", month(number)) for number in range(1, 13)]


@given(
    st.lists(st.tuples(st.booleans(), st.integers(0, 9)), min_size=2).filter(
        lambda rows: len({late for late, _ in rows}) == 2
    )
)
def test_auc_is_mann_and_whitneys_u_also_with_ties(rows) -> None:
    """scipy's U divided by the number of pairs is the same area."""
    late = np.array([late for late, _ in rows])
    score = np.array([float(score) for _, score in rows])

    expected = mannwhitneyu(score[late], score[~late]).statistic / (late.sum() * (~late).sum())

    assert auc(late, score) == pytest.approx(expected, abs=1e-12)


def test_auc_of_one_outcome_is_not_a_number() -> None:
    """Without a late flight, or without a punctual one, there is no pair to compare."""
    assert math.isnan(auc(np.zeros(5, np.bool_), np.arange(5.0)))
    assert math.isnan(auc(np.ones(5, np.bool_), np.arange(5.0)))
    assert math.isnan(auc_error(0.7, 0, 10))


def test_auc_error_is_that_of_simulated_months() -> None:
    """400 months of binormal scores scatter as the formula says, within 15 %."""
    rng = np.random.default_rng(5)
    n_late, n_punctual = 500, 1500
    late = np.arange(n_late + n_punctual) < n_late
    area = norm.cdf(0.75 / math.sqrt(2))

    areas = [auc(late, rng.normal(size=late.size) + 0.75 * late) for _ in range(400)]

    assert np.mean(areas) == pytest.approx(area, abs=0.003)
    assert auc_error(area, n_late, n_punctual) == pytest.approx(1.96 * np.std(areas), rel=0.15)


def test_a_quiet_year_is_told_as_one() -> None:
    """Nothing is claimed that did not happen: no alarm, no fall, no late December."""
    text = story.told(year(), 3)

    assert text.startswith("No alarm was raised all year.")
    assert "Distance and carrier never moved: PSI at most 0.01 and 0.01." in text
    for claim in ("Drift is not failure", "fell", "December", "followed"):
        assert claim not in text


def test_first_alarm_is_told_with_its_months_and_numbers() -> None:
    """The month that raised it, the month it began, its PSI and its no-drift line."""
    text = story.told(year(m5=month(5, temp=3.0), m6=month(6, temp=4.0)), 3)

    assert "raised in May: temperature" in text
    assert "since April (PSI 3.00; without drift below 0.02)" in text


def test_drift_is_called_harmless_only_where_auc_held() -> None:
    """The same temperature with an AUC below home gets the plain sentence."""
    held = story.told(year(m7=month(7, temp=15.0, area=0.76)), 3)
    fell = story.told(year(m7=month(7, temp=15.0, area=0.60)), 3)

    assert "Drift is not failure: in July temperature PSI was highest, 15.00" in held
    assert "Drift is not failure" not in fell
    assert "In July temperature PSI was highest, 15.00, and AUC was 0.60" in fell


def test_autumn_is_told_only_if_both_months_fell() -> None:
    """September and October must both lie below every training month."""
    autumn = {"m9": month(9, area=0.65), "m10": month(10, area=0.66)}

    assert "AUC fell to 0.65 in September and 0.66 in October" in story.told(year(**autumn), 3)
    assert "fell" not in story.told(year(m9=autumn["m9"]), 3)


@pytest.mark.parametrize(
    ("temp", "late", "claim"),
    [
        (0.20, 0.32, "temperature was below the alarm line again (PSI 0.20)"),
        (0.30, 0.32, "temperature was nearly that of winter again (PSI 0.30)"),
        (9.00, 0.32, None),
        (0.20, 0.22, None),
    ],
)
def test_december_is_told_by_its_numbers(temp, late, claim) -> None:
    """Back below the line, nearly back, or not; and only if the delays are not back."""
    months = year(m7=month(7, temp=15.0), m12=month(12, temp=temp, late=late))

    text = story.told(months, 3)

    assert ("In December" in text) == (claim is not None)
    if claim:
        assert claim in text
        assert "32 % of the flights came late, 12 points more" in text


def test_changes_name_what_opened_and_what_ended() -> None:
    """A plus for a new alarm, a minus for one that is over, nothing for one that lasts."""
    dew = Alarm("input:dewp", 0.5, 0.02, 4)
    now = dataclasses.replace(month(6, temp=3.0), alarms=month(6, temp=3.0).alarms)

    lines = story.change_lines((dew,), now)

    assert [line[0] for line in lines] == ["+", "-"]
    assert "temperature: alarm, PSI 3.00, since May" in lines[0]
    assert "dew point: alarm over, PSI 0.01" in lines[1]
    assert story.change_lines(now.alarms, now) == []


def test_alarm_of_the_output_speaks_of_answers() -> None:
    """An alarm on the output is not explained by new flights."""
    answers = Alarm("output:probability", 0.4, 0.02, 3)

    text = " ".join(story.alarm_lines([answers], month(4)))

    assert "answers are spread otherwise" in text
    assert "flights unlike" not in text


def test_a_window_past_december_has_a_number() -> None:
    """Rows that others send make more windows than months."""
    assert name_of(4) == "April"
    assert name_of(13) == "window 13"


@pytest.mark.parametrize(("temp", "code"), [(3.0, 0), (0.1, 1)])
def test_exit_code_says_whether_temperature_alarmed(temp, code, capsys) -> None:
    """Without the alarm that is due the demo fails, and says which."""
    screen = Screen(24_000, is_paced=False)

    assert replay._verdict(screen, year(m6=month(6, temp=temp))) == code
    assert ("No temperature alarm was raised" in capsys.readouterr().out) == bool(code)


def test_any_row_fits_the_width(capsys) -> None:
    """Also one with a score that is missing, of two digits, or without end."""
    screen = Screen(24_000, is_paced=False)
    screen.header()
    for psi in (math.nan, 0.0, 9.994, 9.996, 15.9, 99.9):
        screen.closed(dataclasses.replace(month(9), psi=dict.fromkeys(CHANNELS, psi)))

    lines = capsys.readouterr().out.splitlines()

    assert {len(line) for line in lines} == {WIDTH}
