"""Labels as clients send them (JSON, MessagePack, CSV) to labels that are well formed, or reasons.

One bad label never refuses the others: each is judged by itself.
"""

import csv
import io
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import msgpack  # type: ignore[import-untyped]  # it comes without types
import orjson

from gateway.errors import BadRequestError, TooLargeError, shown
from gateway.labels import ids
from gateway.labels.rows import VERDICTS, Label, Verdict
from gateway.labels.target import Target

LABELS_MAX = 100_000
"""In one request."""
PROBLEMS_MAX = 100
"""Told in one answer; the counts count all."""
_TEXT_CHARS_MAX = 256
_EXACT_MAX = 2**53
_MESSAGEPACK_BYTES_MAX = 4 * 1024 * 1024
"""An empty list is one byte there, and seventy in memory."""
_FIELDS = ("id", "label", "model")
_WORDS = {"true": 1.0, "false": 0.0}


@dataclass(frozen=True, slots=True)
class Given:
    """One label as it was sent."""

    id: Any
    label: Any
    model: Any = None
    is_text: bool = False
    """It came as text, and may stand for a number."""


@dataclass(slots=True)
class Summary:
    """What became of the labels of one request."""

    counts: dict[Verdict, int] = field(default_factory=lambda: dict.fromkeys(VERDICTS, 0))
    problems: list[dict[str, Any]] = field(default_factory=list)

    def add(self, verdict: Verdict, n: int = 1) -> None:
        """Count labels without a word."""
        self.counts[verdict] += n

    def tell(self, at: int, id_: object, verdict: Verdict, reason: str) -> None:
        """Count one label and say why."""
        self.counts[verdict] += 1
        if len(self.problems) < PROBLEMS_MAX:
            named = id_ if isinstance(id_, str) and len(id_) <= ids.ID_CHARS_MAX + 8 else shown(id_)
            self.problems.append({"at": at, "id": named, "is": verdict, "reason": reason})

    def to_dict(self) -> dict[str, Any]:
        """In plain JSON types."""
        told = sum(self.counts[verdict] for verdict in REASONS) + self.counts["invalid"]
        return {
            **{str(verdict): n for verdict, n in self.counts.items()},
            "problems": self.problems,
            "problems_left_out": max(told - len(self.problems), 0),
        }


REASONS: Mapping[Verdict, str] = {
    "unknown": "no prediction of this id is here yet; the label waits for it, up to labels.wait_s",
    "late": "the prediction was let go after labels.days",
    "not_sampled": "predictions of this id are not kept (labels.sample)",
    "conflict": "another label of this id is here, and stays",
}
"""Of each verdict that somebody may want to look into."""


def read(body: bytes, media_type: str) -> list[Given]:
    """The labels of a body.

    Raises
    ------
    BadRequestError, TooLargeError
    """
    if media_type == "text/csv":
        return list(_limited(_csv(body)))
    if media_type.endswith("msgpack"):
        document = _messagepack(body)
    else:
        try:
            document = orjson.loads(body)
        except orjson.JSONDecodeError as error:
            raise BadRequestError(f"the body is not JSON: {error}") from None
    model = None
    if isinstance(document, dict):
        for name in document:
            if name not in ("labels", "model"):
                raise BadRequestError(f"no field {shown(name)} here; there are: labels, model")
        model, document = document.get("model"), document.get("labels")
    if not isinstance(document, list):
        raise BadRequestError('the body must be a list of labels, or {"labels": [...]}')
    return list(_limited(_given(entry, model) for entry in document))


def _messagepack(body: bytes) -> Any:
    if len(body) > _MESSAGEPACK_BYTES_MAX:
        raise TooLargeError(f"a MessagePack body may have {_MESSAGEPACK_BYTES_MAX} bytes here")
    try:
        return msgpack.unpackb(body, max_ext_len=0)
    except (ValueError, msgpack.exceptions.UnpackException, RecursionError):
        raise BadRequestError("the body is not MessagePack") from None


def _given(entry: Any, model: Any) -> Given:
    if not isinstance(entry, dict) or "id" not in entry or "label" not in entry:
        return Given(None, entry)
    if any(name not in _FIELDS for name in entry):
        unknown = next(name for name in entry if name not in _FIELDS)
        raise BadRequestError(f"no field {shown(unknown)} in a label; there are: id, label, model")
    return Given(entry["id"], entry["label"], entry.get("model", model))


def _csv(body: bytes) -> Iterator[Given]:
    try:
        rows = csv.DictReader(io.StringIO(body.decode("utf-8-sig"), newline=""), strict=True)
        columns = rows.fieldnames or []
        if missing := [name for name in ("id", "label") if name not in columns]:
            raise BadRequestError(
                f"the CSV has no column {missing[0]!r}; it takes id, label, model"
            )
        for row in rows:
            yield Given(row["id"], row["label"], row.get("model") or None, is_text=True)
    except (UnicodeDecodeError, csv.Error):
        raise BadRequestError("the body is not CSV in UTF-8") from None


def _limited(given: Iterator[Given]) -> Iterator[Given]:
    for n, entry in enumerate(given):
        if n >= LABELS_MAX:
            raise TooLargeError(f"more than {LABELS_MAX} labels in one request")
        yield entry


# -- judged


def value_of(label: Any, target: Target | None, *, is_text: bool = False) -> float | str | None:
    """A label as a number or the name of a class; None when it is neither, or the wrong one."""
    takes_text = target is not None and target.takes_text
    if isinstance(label, str):
        if is_text and not takes_text:
            label = _number(label)
            return label if label is not None and math.isfinite(label) else None
        is_short = 0 < len(label) <= _TEXT_CHARS_MAX and label.isprintable()
        return label if is_short and (takes_text or target is None) else None
    if takes_text or not isinstance(label, bool | int | float):
        return None
    if isinstance(label, int) and abs(label) > _EXACT_MAX:
        return None
    return float(label) if math.isfinite(label) else None


def _number(text: str) -> float | None:
    stripped = text.strip()
    if (word := _WORDS.get(stripped.lower())) is not None:
        return word
    try:
        # float() takes "1_0" and other scripts' digits too: neither is what a table means.
        return float(stripped) if stripped.isascii() and "_" not in stripped else None
    except ValueError:
        return None


def wanted(target: Target | None) -> str:
    """What a label of this target must be, in words."""
    if target is None:
        return f"a finite number, or a printable text of up to {_TEXT_CHARS_MAX} characters"
    if target.takes_text:
        return (
            f"a printable text of up to {_TEXT_CHARS_MAX} characters, as output {target.output!r}"
        )
    return f"a finite number, true or false, as output {target.output!r} is one"


@dataclass(frozen=True, slots=True)
class Placed:
    """A label that is well formed, and where it stood."""

    at: int
    id: str
    label: Label


def place(
    given: Sequence[Given],
    summary: Summary,
    *,
    models: Mapping[str, Target | None],
    rows_of: Mapping[str, Mapping[str, int]],
) -> list[Placed]:
    """Labels with request, row and model; what has none is told in `summary`.

    Parameters
    ----------
    models : every model that is served, with its target
    rows_of : of requests that are named without a row or a model: rows by model
    """
    placed: list[Placed] = []
    for at, entry in enumerate(given):
        parts = ids.split(entry.id) if isinstance(entry.id, str) else None
        if parts is None:
            summary.tell(at, entry.id, "invalid", 'a label is {"id": prediction id, "label": ...}')
            continue
        request, row = parts
        model = _model(entry, models, rows_of.get(request, {}))
        if model is None or isinstance(model, Refused):
            why = model or Refused("unknown", "no prediction of this id is here; name its model")
            summary.tell(at, entry.id, why.verdict, why.reason)
            continue
        labels, n = entry.label, rows_of.get(request, {}).get(model)
        if row is None and not isinstance(labels, list) and n is not None and n > 1:
            reason = f"the request has {n} rows: give a list of {n}, or name one as id/row"
            summary.tell(at, entry.id, "invalid", reason)
            continue
        if isinstance(labels, list) and (row is not None or (n or len(labels)) != len(labels)):
            reason = "a row has one label" if row is not None else f"the request has {n} rows"
            summary.tell(at, entry.id, "invalid", f"{reason}, {len(labels)} labels are given")
            continue
        target = models.get(model)
        for k, label in enumerate(labels if isinstance(labels, list) else [labels]):
            value = value_of(label, target, is_text=entry.is_text)
            if value is None:
                reason = f"label {shown(label)}: must be {wanted(target)}"
                summary.tell(at, entry.id, "invalid", reason)
                continue
            placed.append(Placed(at, entry.id, Label(request, (row or 0) + k, model, value)))
    return placed


@dataclass(frozen=True, slots=True)
class Refused:
    """A label whose model cannot be told."""

    verdict: Verdict
    reason: str


def _model(
    entry: Given, models: Mapping[str, Target | None], known: Mapping[str, int]
) -> str | Refused | None:
    if entry.model is not None:
        if isinstance(entry.model, str) and (entry.model in models or entry.model in known):
            return entry.model
        return Refused("invalid", f"no model {shown(entry.model)} here")
    if len(known) == 1:
        return next(iter(known))
    if known:
        return Refused("invalid", f"predictions of {', '.join(sorted(known))} have it; name one")
    return next(iter(models)) if len(models) == 1 else None


def need_lookup(given: Sequence[Given]) -> list[str]:
    """Requests that are named without a row or without a model."""
    found = []
    for entry in given:
        parts = ids.split(entry.id) if isinstance(entry.id, str) else None
        if parts is not None and (parts[1] is None or entry.model is None):
            found.append(parts[0])
    return found
