"""Captured requests through another route: exact where it can be, and said where it cannot."""

from collections.abc import Mapping
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gateway.capture.record import Record, pack, unpack
from gateway.errors import OverrideError
from gateway.protocol.call import Call, Served
from gateway.recorder import Recorders
from gateway.router import Decision, Look, Routing
from gateway.simulation import Way, explain, simulate
from gateway.telemetry import Telemetry
from registry import routes
from registry.revisions import ModelState
from registry.signature import Signature, TensorSpec

SERVED = Served("m", 1, Signature((TensorSpec("age", "FP32", (-1,)),), ()), b"")
SALTS = {"split": "00" * 16, "capture": "01" * 16}


class Kept:
    """A log that keeps what it is given, in memory."""

    def __init__(self) -> None:
        self.records: list[Record] = []

    def offer(self, taken: Any) -> None:
        record = unpack(pack(taken.record()))
        assert record is not None
        self.records.append(record)


def state(document: Mapping[str, Any], **more: Any) -> ModelState:
    """What is in force with this route; champion 1, challenger 2."""
    route = routes.parse_one("m", document)
    salts = more.get("salts", SALTS)
    return ModelState(
        follow=False,
        aliases={"champion": 1, "challenger": 2},
        route=route,
        salts=salts,
        buckets=routes.table(route, "", bytes.fromhex(salts["split"])).format()
        if route.split
        else "",
    )


Request = tuple[dict[str, str], dict[str, Any], float]
"""Headers, parameters, and the input `age`."""


def capture(document: Mapping[str, Any], requests: list[Request]) -> list[Record]:
    """The requests as a recorder keeps them under a route that captures all."""
    log: Any = Kept()
    recorders = Recorders(log)
    routing = Routing("m", state(document), 1, Telemetry())
    recorder = recorders.of("m", routing)
    assert recorder is not None
    for headers, parameters, age in requests:
        pairs, look = seen(headers, parameters, age)
        taking = recorder.begin("id", pairs, routing.pick(pairs, look), 1, look, 0.0)
        assert taking is not None
        call = Call([], parameters=parameters)
        taking.bound(SERVED, [np.array([age], np.float32)], 1, call)
        taking.ended()
    return log.records


def seen(
    headers: dict[str, str], parameters: dict[str, Any], age: float
) -> tuple[list[tuple[bytes, bytes]], Look]:
    """A request as the router sees it."""
    pairs = [(name.encode(), value.encode()) for name, value in headers.items()]
    return pairs, Look(parameters, ["age"], [np.array([age], np.float32)], 1)


SPLIT = [{"to": "champion", "weight": "rest"}, {"to": "challenger", "weight": 30}]
UNITS = ["header:x-user", "field:customer", "field:age", "request"]
HEADERS = st.fixed_dictionaries(
    {}, optional={"x-user": st.sampled_from("abcdefgh"), "x-plan": st.sampled_from(["gold", "s"])}
)
PARAMETERS = st.fixed_dictionaries(
    {}, optional={"customer": st.integers(0, 5), "tier": st.integers(0, 4)}
)
REQUESTS = st.lists(st.tuples(HEADERS, PARAMETERS, st.sampled_from([1.0, 2.5])), max_size=12)
RULES = st.lists(
    st.sampled_from([
        {"name": "gold", "when": {"header": {"x-plan": "gold"}}, "to": "challenger"},
        {"name": "tier", "when": {"field": {"tier": {"gte": 2}}}, "to": "champion"},
        {"name": "old", "when": {"field": {"age": {"gt": 2}}}, "to": 2},
        {"name": "one", "when": {"rows": 1, "header": {"x-user": "a"}}, "to": 2},
    ]),
    max_size=2,
    unique_by=lambda rule: str(rule["name"]),
)  # fmt: skip
ROUTES = st.fixed_dictionaries(
    {
        "unit": st.sampled_from([UNITS, UNITS[1:], ["header:x-user"], ["field:age"]]),
        "rules": RULES,
        "split": st.just(SPLIT),
    }
)


@settings(max_examples=80, deadline=None)
@given(requests=REQUESTS, before=ROUTES, after=ROUTES)
def test_where_everything_is_kept_the_simulation_is_the_router(
    requests: list[Request], before: dict[str, Any], after: dict[str, Any]
) -> None:
    """Rules, units and shares of any route, from a capture of any other: as the router decides."""
    sources = ["header:x-user", "header:x-plan", "field:customer", "field:tier"]
    captured = capture({**before, "capture": {"sample": 100, "also": sources}}, requests)
    way, routing = Way("m", state(after)), Routing("m", state(after), 1, Telemetry())

    for record, request in zip(captured, requests, strict=True):
        guess, decision = way.decide(record), routing.pick(*seen(*request))

        assert guess.is_exact
        assert guess.unknown == ()
        assert guess.decision.choice.reason == decision.choice.reason
        if decision.choice.reason == "SPLIT":
            assert guess.unit == decision.unit_kind
        if decision.unit_kind != "request":  # each of these is drawn anew
            assert chosen(guess.decision) == chosen(decision)


def chosen(decision: Decision) -> tuple[str, int, float]:
    """What was decided, whatever the revision."""
    return decision.choice.variant, decision.choice.version, decision.choice.p


def test_hashes_are_enough_while_the_salt_stays() -> None:
    """With nothing kept but hash and bucket, another weight moves who it will move, exactly."""
    requests: list[Request] = [({"x-user": f"u{k}"}, {}, 1.0) for k in range(400)]
    document = {"unit": ["header:x-user"], "split": SPLIT, "capture": {"sample": 100}}
    captured = capture(document, requests)
    assert all(unit.value is None for record in captured for unit in record.units)
    more = {**document, "split": [SPLIT[0], {"to": "challenger", "weight": 55}]}

    made = simulate(captured, Way("m", state(document)), Way("m", state(more))).document()

    routings = [Routing("m", state(each), 1, Telemetry()) for each in (document, more)]
    moved = [
        k
        for k, request in enumerate(requests)
        if len({routing.pick(*seen(*request)).choice.version for routing in routings}) == 2
    ]
    assert made["moved"]["units"] == made["moved"]["requests"] == len(moved) > 50
    assert made["moved"]["ways"] == [
        {"before": "champion", "after": "challenger", "requests": len(moved)}
    ]
    assert (made["stand_ins"], made["not_captured"]) == (0, {})


def test_after_a_new_salt_shares_are_right_and_it_is_said() -> None:
    """A rollout draws a new salt: without values a stand-in is drawn, once for each unit."""
    requests: list[Request] = [({"x-user": f"u{k % 1000}"}, {}, 1.0) for k in range(2000)]
    document = {"unit": ["header:x-user"], "split": SPLIT, "capture": {"sample": 100}}
    other = Way("m", state(document, salts={**SALTS, "split": "07" * 16}))
    captured = capture(document, requests)

    guesses = [other.decide(record) for record in captured]
    assert not any(guess.is_exact for guess in guesses)
    first, second = guesses[:1000], guesses[1000:]
    assert [g.decision.bucket for g in first] == [g.decision.bucket for g in second]
    share = sum(guess.decision.choice.version == 2 for guess in first) / 1000
    assert abs(share - 0.3) < 4 * (0.3 * 0.7 / 1000) ** 0.5
    assert simulate(captured, other, other).stand_ins == 2000

    kept = capture({**document, "capture": {"sample": 100, "units": True}}, requests[:50])
    routing = Routing("m", state(document, salts={**SALTS, "split": "07" * 16}), 1, Telemetry())
    for record, request in zip(kept, requests, strict=False):
        guess = other.decide(record)
        assert guess.is_exact
        assert chosen(guess.decision) == chosen(routing.pick(*seen(*request)))


def test_what_was_not_kept_is_named() -> None:
    """A rule or a unit that looks elsewhere: taken as absent, counted by name."""
    document = {"unit": ["header:x-user"], "split": SPLIT, "capture": {"sample": 100}}
    captured = capture(document, [({"x-user": "a", "x-plan": "gold"}, {"tier": 3}, 1.0)] * 3)
    new = {
        **document,
        "unit": ["header:x-account", "header:x-user"],
        "rules": [
            {"name": "g", "when": {"header": {"x-plan": "gold"}}, "to": 2},
            {"name": "u", "when": {"header": {"x-user": "a"}}, "to": 2},
            {"name": "t", "when": {"field": {"tier": 3}}, "to": 2},
        ],
    }

    made = simulate(captured, Way("m", state(document)), Way("m", state(new))).document()

    assert made["not_captured"] == {
        "field:tier": 3, "header:x-account": 3, "header:x-plan": 3, "header:x-user": 3,
    }  # fmt: skip
    assert [entry["name"] for entry in made["rules"]] == []


def test_what_is_redacted_leaves_nothing_but_the_bucket() -> None:
    """Neither value nor hash, of a unit, a header, a parameter or an input."""
    names = ["header:x-user", "header:x-plan", "field:tier", "field:age"]
    document = {
        "unit": ["header:x-user"],
        "rules": [
            {"name": "g", "when": {"header": {"x-plan": "none"}, "field": {"tier": 9}}, "to": 2}
        ],
        "split": SPLIT,
        "capture": {"sample": 100, "units": True, "redact": names},
    }
    (record,) = capture(document, [({"x-user": "a", "x-plan": "gold"}, {"tier": 3}, 1.0)])

    assert (record.headers, record.parameters, record.inputs, record.looked) == ({}, {}, (), ())
    (unit,) = record.units
    assert (unit.kind, unit.hash, unit.value) == ("header:x-user", "", None)
    assert unit.bucket == record.bucket


def test_explain_needs_no_server() -> None:
    """With and without a route, by rule, by unit, by name; what is not allowed is refused."""
    document = {"unit": ["header:x-user"], "split": SPLIT, "allow_override": True}
    routing = Routing("m", state(document), 5, Telemetry())
    headers = [(b"x-user", b"ana")]

    said = explain("m", state(document), 5, 1, headers, None, None)
    assert said == routing.pick(headers, None).header
    bare = msgspec.structs.replace(state(document), route=None, buckets="")
    assert explain("m", bare, 5, 1, headers, None, None) == (
        b"rev=5; variant=champion; version=1; reason=DEFAULT; p=1"
    )
    named = [*headers, (b"x-driftgate-version", b"challenger")]
    assert b"version=2; reason=TARGET_OVERRIDE" in explain(
        "m", state(document), 5, 1, named, None, None
    )
    closed = state({"unit": ["header:x-user"], "split": SPLIT})
    with pytest.raises(OverrideError):
        explain("m", closed, 5, 1, named, None, None)
