"""The demo in words, each sentence said only if the measured numbers say so."""

from collections.abc import Sequence

from gateway.demo.months import Alarm, Month, name_of

OUTPUT = "output:probability"
TEMPERATURE = "input:temp"

_WORDS = {
    "temp": "temperature",
    "dewp": "dew point",
    "humid": "humidity",
    "wind_speed": "wind speed",
    "precip": "precipitation",
    "pressure": "air pressure",
    "visib": "visibility",
    "hour": "hour of departure",
    "origin": "airport of origin",
    "probability": "the model's score",
}

_ALARM_PSI = 0.25
_CALM_PSI = 0.1
_POINTS_MIN = 0.05


def words(channel: str) -> str:
    """What people call a channel."""
    name = channel.partition(":")[2]
    return _WORDS.get(name, name)


def alarm_lines(alarms: Sequence[Alarm], month: Month) -> list[str]:
    """The first alarm: what, since when, the number and its line, what it means, what else."""
    first = worst(alarms)
    meaning = (
        "The model now meets flights unlike those it was trained on."
        if first.channel != OUTPUT
        else "The model's answers are spread otherwise than on its training data."
    )
    lines = [
        (
            f"{_capital(words(first.channel))} has drifted: since {name_of(first.since)}, raised"
            f" in {month.name}."
        ),
        f"PSI {first.psi:.2f}. Without drift, 99 of 100 windows stay below {first.line:.3f}.",
        meaning,
        "Whether its answers are still good, only outcomes can tell.",
    ]
    others = [alarm for alarm in alarms if alarm is not first]
    if others:
        lines.append(
            "In the same month: "
            + _joined([f"{words(alarm.channel)} ({alarm.psi:.2f})" for alarm in others])
            + "."
        )
    return lines


def change_lines(before: Sequence[Alarm], month: Month) -> list[str]:
    """Alarms that opened or ended with this month, a line each."""
    old, new = ({alarm.channel for alarm in alarms} for alarms in (before, month.alarms))
    opened = [
        f"+ {words(alarm.channel)}: alarm, PSI {alarm.psi:.2f}, since {name_of(alarm.since)}"
        f" (without drift below {alarm.line:.3f})"
        for alarm in month.alarms
        if alarm.channel not in old
    ]
    ended = [
        f"- {words(alarm.channel)}: alarm over, PSI {month.psi[alarm.channel]:.2f}"
        for alarm in before
        if alarm.channel not in new
    ]
    return opened + ended


def worst(alarms: Sequence[Alarm]) -> Alarm:
    """The alarm with the highest PSI."""
    return max(alarms, key=lambda alarm: alarm.psi)


def told(months: Sequence[Month], n_training: int) -> str:
    """The whole year in one paragraph.

    Parameters
    ----------
    months : all months, in order
    n_training : how many of the first the model was trained on
    """
    error = max(month.auc_error for month in months)
    sentences = [
        _first_alarm(months),
        _steady(months),
        _drift_is_not_failure(months, n_training),
        _failure_is_not_drift(months, n_training),
        _december(months, n_training),
        f"(AUC of one month is known to within about {error:.2f}.)",
    ]
    return " ".join(sentence for sentence in sentences if sentence)


def _first_alarm(months: Sequence[Month]) -> str:
    opened = _opened(months)
    if not opened:
        return "No alarm was raised all year."
    number = min(month for month, _ in opened.values())
    at_once = [alarm for month, alarm in opened.values() if month == number]
    first = worst(at_once)
    others = [words(alarm.channel) for alarm in at_once if alarm is not first]
    text = (
        f"The first alarm was raised in {name_of(number)}: {words(first.channel)} had"
        f" been unlike the training months since {name_of(first.since)} (PSI {first.psi:.2f};"
        f" without drift below {first.line:.2f})"
    )
    text += f", and with it {_joined(others)}." if others else "."
    later = [
        f"{words(alarm.channel)} in {name_of(month)}"
        for month, alarm in opened.values()
        if month > number
    ]
    return f"{text} Later followed {_joined(later)}." if later else text


def _steady(months: Sequence[Month]) -> str:
    alarmed = _opened(months)
    names = [name for name in ("input:distance", "input:carrier") if name not in alarmed]
    if not names:
        return ""
    highest = [max(month.psi[name] for month in months) for name in names]
    how = "moved" if max(highest) < _CALM_PSI else "raised one"
    return (
        f"{_capital(_joined([words(name) for name in names]))} never {how}: PSI at most"
        f" {_joined([f'{value:.2f}' for value in highest])}."
    )


def _drift_is_not_failure(months: Sequence[Month], n_training: int) -> str:
    low, high = _home(months, n_training)
    hottest = max(months, key=lambda month: month.psi[TEMPERATURE])
    psi = f"temperature PSI was highest, {hottest.psi[TEMPERATURE]:.2f}"
    home = f"({low:.2f} to {high:.2f} in the training months)"
    if hottest.psi[TEMPERATURE] >= _ALARM_PSI and hottest.auc >= low:
        return (
            f"Drift is not failure: in {hottest.name} {psi}, and AUC was still"
            f" {hottest.auc:.2f} {home}."
        )
    return f"In {hottest.name} {psi}, and AUC was {hottest.auc:.2f} {home}."


def _failure_is_not_drift(months: Sequence[Month], n_training: int) -> str:
    low, _ = _home(months, n_training)
    before, *autumn = (month for month in months if month.number in {8, 9, 10})
    if len(autumn) < 2 or any(month.auc >= low for month in autumn):
        return ""
    figures = _joined([f"{month.auc:.2f} in {month.name}" for month in autumn])
    text = f"AUC fell to {figures}"
    path = [month.psi[TEMPERATURE] for month in (before, *autumn)]
    if path == sorted(path, reverse=True):
        text += ", while temperature was already on its way back"
    lowest = min(months, key=lambda month: month.auc)
    if lowest not in autumn:
        text += f"; its lowest was {lowest.auc:.2f} in {lowest.name}"
    return text + "."


def _december(months: Sequence[Month], n_training: int) -> str:
    last = months[-1]
    training = months[:n_training]
    n_flights = sum(month.n_flights for month in training)
    rate = sum(month.late_rate * month.n_flights for month in training) / n_flights
    psi, highest = last.psi[TEMPERATURE], max(month.psi[TEMPERATURE] for month in months)
    if psi < _ALARM_PSI:
        back = "below the alarm line again"
    elif psi < 0.1 * highest:
        back = "nearly that of winter again"
    else:
        return ""
    if last.late_rate - rate < _POINTS_MIN:
        return ""
    text = f"In {last.name} temperature was {back} (PSI {psi:.2f})"
    if last.psi[OUTPUT] < _CALM_PSI:
        text += f" and the scores were spread as in training (PSI {last.psi[OUTPUT]:.2f})"
    return (
        f"{text}, yet {100 * last.late_rate:.0f} % of the flights came late,"
        f" {100 * (last.late_rate - rate):.0f} points more than in the training months:"
        " neither can show that, outcomes do."
    )


def _home(months: Sequence[Month], n_training: int) -> tuple[float, float]:
    """Lowest and highest AUC of the training months."""
    areas = [month.auc for month in months[:n_training]]
    return min(areas), max(areas)


def _opened(months: Sequence[Month]) -> dict[str, tuple[int, Alarm]]:
    """The first alarm of each channel and the month that raised it."""
    opened: dict[str, tuple[int, Alarm]] = {}
    for month in months:
        for alarm in month.alarms:
            opened.setdefault(alarm.channel, (month.number, alarm))
    return opened


def _joined(texts: Sequence[str]) -> str:
    return " and ".join([", ".join(texts[:-1]), texts[-1]] if len(texts) > 1 else texts)


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]
