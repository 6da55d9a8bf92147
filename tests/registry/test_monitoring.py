"""What a revision may say about monitors: read strictly, laid over what was said before."""

from typing import Any

import pytest

from registry import monitoring
from registry.errors import ChangeError

FULL: dict[str, Any] = {
    "sample": 25, "tolerance": 0.02, "window_rows": 500, "webhooks": ["retrain"],
    "budget": {"alarms": 2, "days": 30},
    "labels": {"sample": 50, "days": 90, "mature_s": 86400, "adopt_rows": 1000},
    "target": {"output": "score", "column": 1, "task": "binary", "positive": "late",
               "threshold": 0.3},
}  # fmt: skip


def test_every_setting_is_read() -> None:
    """And nothing, where nothing is said."""
    found = monitoring.read(FULL)
    assert found.budget is not None
    assert found.labels is not None
    assert (found.sample, found.budget.days, found.labels.mature_s) == (25, 30, 86400)
    assert monitoring.target(found) == FULL["target"]
    assert monitoring.read(None) == monitoring.read({}) == monitoring.Monitoring()


@pytest.mark.parametrize(
    ("document", "said"),
    [
        ({"tolerence": 1}, "did you mean tolerance"),
        ({"segments": ["carrier"]}, "driftgate profile --segment"),
        ({"windows": {}}, "window_rows"),
        ({"sample": 101}, "from 0 to 100"),
        ({"sample": "half"}, "monitor.sample"),
        ({"tolerance": float("nan")}, "finite"),
        ({"budget": {"days": 30, "rows": 1000}}, "days or rows"),
        ({"budget": 3}, "must be a mapping"),
        ({"labels": {"adopt_rows": 5}}, "from 200"),
        ({"labels": {"inputs": True}}, "no such field"),
        ({"target": {"task": "ranking"}}, "monitor.target.task"),
        ({"target": {"task": "regression", "positive": "x"}}, "only a binary task"),
        ({"webhooks": "retrain"}, "monitor.webhooks"),
    ],
)
def test_what_is_wrong_is_named_with_what_would_be_right(
    document: dict[str, Any], said: str
) -> None:
    """Unknown fields, values out of range, and what is not said here."""
    with pytest.raises(ChangeError, match=said):
        monitoring.read(document)


def test_everything_that_is_wrong_is_told_at_once() -> None:
    """Not only the first."""
    with pytest.raises(ChangeError) as error:
        monitoring.read({"sample": -1, "window_rows": 1, "segments": []})
    assert all(name in str(error.value) for name in ("sample", "window_rows", "segments"))


def test_a_document_is_laid_over_another_and_null_takes_away() -> None:
    """As RFC 7396 has it; what is left empty is gone."""
    merged = monitoring.merged(FULL, {"budget": {"days": 7}, "labels": None, "sample": None})
    assert merged is not None
    assert merged["budget"] == {"alarms": 2, "days": 7}
    assert "labels" not in merged
    assert "sample" not in merged
    assert monitoring.merged({"budget": {"days": 7}}, {"budget": {"days": None}}) is None
    assert FULL["budget"] == {"alarms": 2, "days": 30}
