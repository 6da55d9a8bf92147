"""Which variant a call gets: rules in order, then unit, bucket, table; and what is said of it."""

from typing import Any

import numpy as np
import pytest
from scipy import stats

from gateway.errors import OverrideError, VersionNotFoundError
from gateway.router import Look, Model, Routing
from gateway.telemetry import UNIT_FALLBACK, Telemetry
from registry import routes
from registry.buckets import bucket_of
from registry.revisions import ModelState

SALT = bytes(range(16))


def routing(document: dict[str, Any], telemetry: Telemetry | None = None) -> Routing:
    """A compiled route; champion 7, challenger 9."""
    route = routes.parse_one("m", document)
    state = ModelState(
        follow=False,
        aliases={"champion": 7, "challenger": 9},
        route=route,
        salts={"split": SALT.hex()},
        buckets=routes.table(route, "", SALT).format() if route.split else "",
    )
    return Routing("m", state, 42, telemetry or Telemetry())


def look(rows: int = 1, *, inputs: dict[str, Any] | None = None, **parameters: Any) -> Look:
    """A body with these inputs and parameters."""
    given = inputs or {}
    return Look(parameters, list(given), [np.array(v) for v in given.values()], rows)


SPLIT = {"split": [{"to": "champion", "weight": "rest"}, {"to": "challenger", "weight": 5}]}
USER = {"unit": ["header:x-user-id", "request"], **SPLIT}


def test_a_unit_is_assigned_by_its_bucket_and_always_the_same() -> None:
    """The decision is a function of salt, unit and table, and says so."""
    route, other = routing(USER), routing(USER)
    seen = set()
    for k in range(2000):
        unit = f"user-{k}"
        headers = [(b"accept", b"*/*"), (b"x-user-id", f" {unit} ".encode()), (b"x-user-id", b"z")]
        decision = route.pick(headers, None)

        assert decision.bucket == bucket_of(SALT, unit)
        assert decision.header == other.pick(headers, None).header
        seen.add(decision.choice.variant)
        variant, version, p = ("challenger", 9, "0.05") if decision.choice.version == 9 else (
            "champion", 7, "0.95",
        )  # fmt: skip
        assert decision.header.decode() == (
            f"rev=42; variant={variant}; version={version}; reason=SPLIT;"
            f" bucket={decision.bucket}; p={p}; unit=header:x-user-id"
        )
    assert seen == {"champion", "challenger"}


def test_requests_without_a_unit_are_drawn_one_by_one_and_counted() -> None:
    """An empty unit would send everybody without one to the same variant."""
    telemetry = Telemetry()
    route = routing(USER, telemetry)

    picked = [route.pick([(b"x-user-id", b" ")], None) for _ in range(4000)]

    share = sum(d.choice.variant == "challenger" for d in picked)
    assert stats.binomtest(share, 4000, 0.05).pvalue > 1e-6
    assert {d.unit_kind for d in picked} == {"request"}
    assert telemetry.counter(UNIT_FALLBACK, "m", "request").value == 4000


def test_units_of_the_body_are_the_same_in_every_form() -> None:
    """A parameter first, else an input of one element; 42, 42.0 and "42" are one unit."""
    route = routing({"unit": ["field:customer"], **SPLIT})
    forms = [look(customer=42), look(customer="42"), look(customer=42.0),
             look(inputs={"customer": np.array([42.0], np.float32)})]  # fmt: skip

    assert {route.pick([], form).bucket for form in forms} == {bucket_of(SALT, "42")}
    assert route.pick([], look(inputs={"customer": [1, 2]})).unit_kind == "request"
    assert route.reads_body
    assert not routing(USER).reads_body


def test_the_first_rule_that_matches_decides() -> None:
    """In order, all conditions of one, with the odds 1 of what is no draw."""
    route = routing({
        **USER,
        "rules": [
            {"name": "beta", "when": {"header": {"x-cohort": ["beta", "staff"]}}, "to": 9},
            {"name": "bots", "when": {"header": {"user-agent": {"prefix": "bot"},
                                                 "x-user-id": {"present": False}}}, "to": 7},
            {"name": "big", "when": {"rows": {"gte": 1000}}, "to": "champion"},
            {"name": "rich", "to": 9,
             "when": {"field": {"amount": {"gt": 5, "lte": 9}, "eu": True}}},
        ],
    })  # fmt: skip

    def reason(headers: list[tuple[bytes, bytes]], body: Look) -> str:
        return route.pick(headers, body).choice.reason

    assert reason([(b"x-cohort", b"staff ")], look()) == "RULE_MATCH(beta)"
    assert reason([(b"x-cohort", b"BETA")], look()) == "SPLIT"
    assert reason([(b"user-agent", b"bot/1")], look()) == "RULE_MATCH(bots)"
    assert reason([(b"user-agent", b"bot/1"), (b"x-user-id", b"1")], look()) == "SPLIT"
    assert reason([(b"x-cohort", b"beta")], look(5000)) == "RULE_MATCH(beta)"
    assert reason([], look(1000)) == "RULE_MATCH(big)"
    assert reason([], look(amount=9, eu=True)) == "RULE_MATCH(rich)"
    assert reason([], look(amount=9, eu=1)) == "SPLIT"
    assert reason([], look(amount=9.5, eu=True)) == "SPLIT"
    assert reason([], look(amount="6", eu=True)) == "SPLIT"
    decision = route.pick([(b"x-cohort", b"beta")], look())
    assert decision.header == b"rev=42; variant=9; version=9; reason=RULE_MATCH(beta); p=1"


def test_zero_weight_means_no_traffic() -> None:
    """Zero is a number, not something unset."""
    route = routing(
        {"split": [{"to": "champion", "weight": 100}, {"to": "challenger", "weight": 0}]}
    )

    assert {route.pick([], None).choice.variant for _ in range(500)} == {"champion"}


def test_a_client_names_a_variant_only_where_the_route_allows_it() -> None:
    """Else it is refused: a header that is silently ignored is worse."""
    with pytest.raises(OverrideError):
        routing(USER).override("challenger")

    route = routing({**USER, "allow_override": True})
    assert route.override("challenger").choice.traffic == "pinned"
    assert route.override("12").choice.version == 12
    with pytest.raises(OverrideError, match="champion, challenger"):
        route.override("nobody")


def test_labels_are_aliases() -> None:
    """TensorFlow Serving's labels name what aliases name."""
    model = Model("m", (7, 9), aliases={"champion": 7, "challenger": 9})

    assert model.labelled("champion") is None
    assert model.labelled("challenger") == "9"
    with pytest.raises(VersionNotFoundError, match="challenger, champion"):
        model.labelled("stable")
