"""Requests that were refused for what they hold, by code: more of them than is normal.

There is no training data for it. Normal is what the first requests show, and a share that is
allowed in any case; both are bounds, so only more than that is bet on: fewer refusals are no alarm.
"""

import io
import json
from collections.abc import Sequence
from zipfile import BadZipFile

import numpy as np
import numpy.typing as npt

from monitors.budget import Budget
from monitors.counts import Counts
from monitors.detector import Detector, chi2_quantile
from monitors.episodes import Episodes
from monitors.errors import BlockError
from monitors.layout import SPECIAL, Layout
from monitors.window import Alarm

FEATURE = "requests"
"""What the channels are about; each is called `requests:CODE`."""

_ANY = "any"
_BOUND_ROWS = 10**9
_SHARE_MAX = 0.95
_Z_DOUBT = 3.290527
_LATE_REQUESTS = 500.0
_STATE_FORMAT = 1


class Refusals:
    """Judges how many requests of a model are refused, code by code and in all.

    Parameters
    ----------
    codes : that a request may be refused with
    budget : false alarms that may be raised by requests
    allowed : share of requests that may be refused with each code, and in all
    learn : requests that show what else is normal, before anything is judged

    Notes
    -----
    The promise: if later requests are refused with no code more often, whatever came before them,
    than the bounds say, expected alarms are at most the budget's. The bound of a code is the larger
    of `allowed` and of what the first `learn` requests leave possible: the share whose chance to
    show so few or fewer is 1 in 2,000. For shares below a bound all bets lose, as they are on more.
    """

    def __init__(
        self, codes: Sequence[str], *, budget: Budget, allowed: float = 0.01, learn: int = 1000
    ) -> None:
        if not 0 < allowed < 1:
            raise BlockError(f"allowed = {allowed}: must be a share above 0 and below 1")
        if learn < 0:
            raise BlockError(f"learn = {learn}: must not be negative")
        self.codes = (*codes, _ANY)
        self.budget = budget
        self.allowed = allowed
        self.learn = learn
        self._learnt = np.zeros(1 + len(codes), np.int64)
        self._total = np.zeros(1 + len(codes), np.int64)
        self._late = np.zeros(1 + len(codes))
        self._episodes = Episodes(budget)
        self._detector: Detector | None = None
        if not learn:
            self._begin()

    @property
    def n_requests(self) -> int:
        """Requests seen, those that taught included."""
        return int(self._total.sum())

    @property
    def is_learning(self) -> bool:
        """Whether nothing is judged yet."""
        return self._detector is None

    @property
    def alarms(self) -> tuple[Alarm, ...]:
        """Alarms that are open, pages first."""
        return self._episodes.open

    @property
    def episodes(self) -> tuple[Alarm, ...]:
        """Alarms open and closed, oldest first."""
        return tuple(self._episodes)

    @property
    def evidence(self) -> dict[str, float]:
        """E-value of every channel; none while it learns."""
        if self._detector is None:
            return {}
        values = self._detector.evidence.tolist()
        return dict(zip(self._detector.layout.names, values, strict=True))

    def spend(self, share: float) -> None:
        """Have this share of the budget from now on; see `Detector.spend`."""
        self.budget = self.budget.with_share(share)
        if self._detector is not None:
            self._detector.spend(self.budget)

    def fold(self, counts: Counts, at: float | None = None) -> list[Alarm]:
        """Judge a block of requests; the alarms that were raised.

        Parameters
        ----------
        counts : (1 + n_codes,) requests that were answered, and refused with each code
        at : time in seconds; needed under a budget in days
        """
        n = int(counts.sum())
        if n <= 0:
            return []
        if at is None and self.budget.days is not None:
            raise BlockError("a budget in days needs the time of the requests: fold(..., at=...)")
        self._total += counts
        self._late = self._late * 0.5 ** (n / _LATE_REQUESTS) + counts
        self._episodes.n_rows += n
        self._episodes.at = at if at is not None else self._episodes.at
        if self._detector is None:
            self._learnt += counts
            if self._learnt.sum() >= self.learn:
                self._begin()
            return []
        findings, over = self._detector.fold(self._cells(counts), at=at)
        names = self._detector.layout.names
        for channel in over:
            self._episodes.close(names[channel], None, "back")
        raised = [
            self._episodes.add(found, channel=names[found.channel], feature=FEATURE)
            for found in findings
        ]
        for alarm in self._episodes.expire():
            self._detector.rearm(names.index(alarm.channel))
            self._episodes.close(alarm.channel, None, "acknowledged")
        return raised

    def acknowledge(self, alarm_id: int, at: float | None = None) -> Alarm:
        """Say that an alarm has been seen: it stays quiet for its hold-off, then may come again."""
        return self._episodes.acknowledge(alarm_id, at)

    def learn_anew(self) -> None:
        """Let the next requests say what is normal; what is refused now is accepted."""
        for alarm in self.alarms:
            self._episodes.close(alarm.channel, None, "accepted")
        self._learnt = np.zeros_like(self._learnt)
        self._detector = None
        if not self.learn:
            self._begin()

    def report(self) -> dict[str, object]:
        """Shares of late beside what is normal, in plain JSON types."""
        late, learnt = self._late.sum(), int(self._learnt.sum())
        bounds = None if self._detector is None else self._detector.layout.shares[1::2]
        evidence = None if self._detector is None else self._detector.evidence
        by_code = {}
        for k, code in enumerate(self.codes):
            seen, of_late, first = (
                part[1:].sum() if code == _ANY else part[1 + k]
                for part in (self._total, self._late, self._learnt)
            )
            by_code[code] = {
                "n_refused": int(seen),
                "share": float(of_late / late) if late else None,
                "learnt": float(first / learnt) if learnt else None,
                "bound": None if bounds is None else float(bounds[k]),
                "evidence": 1.0 if evidence is None else min(float(evidence[k]), 1e200),
            }
        return {
            "n_requests": self.n_requests,
            "learning": {"requests": learnt, "of": self.learn} if self.is_learning else None,
            "codes": by_code,
            "level": 0.0 if self._detector is None else float(self._detector.level[0]),
            "alarms": [alarm.to_dict() for alarm in self.alarms],
        }

    def to_bytes(self) -> bytes:
        """Everything that it has seen and concluded; `restore` goes on from there."""
        about = {
            "format": _STATE_FORMAT,
            "codes": self.codes,
            "allowed": self.allowed,
            "learn": self.learn,
            "is_learning": self.is_learning,
            "n_rows": self._episodes.n_rows,
            "at": self._episodes.at,
            **self._episodes.state(),
        }
        detector = {} if self._detector is None else self._detector.state()
        stream = io.BytesIO()
        np.savez(
            stream,
            allow_pickle=False,
            about=np.frombuffer(json.dumps(about).encode(), np.uint8),
            learnt=self._learnt,
            total=self._total,
            late=self._late,
            **{f"detector.{name}": array for name, array in detector.items()},
        )
        return stream.getvalue()

    def restore(self, state: bytes) -> None:
        """Go on from what `to_bytes` gave, to the last bit.

        Raises
        ------
        BlockError : it is of other codes or bounds, of another format, or damaged.
        """
        try:
            with np.load(io.BytesIO(state), allow_pickle=False) as file:
                arrays = {name: file[name] for name in file.files}
            about = json.loads(arrays.pop("about").tobytes())
            mine = (_STATE_FORMAT, list(self.codes), self.allowed, self.learn)
            if (about["format"], about["codes"], about["allowed"], about["learn"]) != mine:
                raise BlockError("state of refusals: it is of another format or other bounds")
            self._learnt = arrays["learnt"].reshape(self._learnt.shape).copy()
            self._total = arrays["total"].reshape(self._total.shape).copy()
            self._late = arrays["late"].reshape(self._late.shape).copy()
            self._detector = None
            if not about["is_learning"]:
                self._begin().restore(
                    {n.removeprefix("detector."): a for n, a in arrays.items() if n[0] == "d"}
                )
            self._episodes.restore(about)
            self._episodes.n_rows, self._episodes.at = about["n_rows"], about["at"]
        except (ValueError, KeyError, TypeError, OSError, BadZipFile, EOFError) as error:
            raise BlockError(f"state of refusals: cannot be read ({error})") from error

    # -- inside

    def _begin(self) -> Detector:
        """Judge from now on, by what was learnt."""
        made = Detector(self._layout(), self.budget, tolerance=0.0, is_rising=True)
        self._detector = made
        return made

    def _layout(self) -> Layout:
        """Two bins for each code, with its bound as the share of the second."""
        n = int(self._learnt.sum())
        refused = np.append(self._learnt[1:], self._learnt[1:].sum()).astype(np.float64)
        bounds = np.full(refused.size, self.allowed)
        if n:
            # By the Poisson distribution, which is wider than the binomial.
            highest = chi2_quantile(2 * (refused + 1), _Z_DOUBT) / 2 / n
            bounds = np.maximum(bounds, highest)
        bounds = np.minimum(bounds, _SHARE_MAX)
        rows = np.rint(bounds * _BOUND_ROWS).astype(np.int64)
        k = len(self.codes)
        labels = [label for code in self.codes for label in ("others", code)]
        labels[-2:] = ["answered", "refused"]
        return Layout(
            names=tuple(f"{FEATURE}:{code}" for code in self.codes),
            features=(FEATURE,) * k,
            sizes=np.full(k, 2, np.intp),
            n_ordered=np.full(k, 2, np.intp),
            counts=np.stack([_BOUND_ROWS - rows, rows], axis=1).ravel(),
            doubt=np.zeros(2 * k),
            labels=tuple(labels),
            special={word: [-1] * k for word in SPECIAL},
            effects=np.ones(k),
        )

    def _cells(self, counts: Counts) -> npt.NDArray[np.int64]:
        """(2 * n_channels,) requests per bin."""
        refused = np.append(counts[1:], counts[1:].sum())
        cells: npt.NDArray[np.int64] = np.stack([counts.sum() - refused, refused], axis=1).ravel()
        return cells
