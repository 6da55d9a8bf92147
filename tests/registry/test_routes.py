"""Route documents: read whole, or refused with everything that is wrong in them."""

import json

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from registry import routes
from registry.routes import Range, Route, RouteError

FULL = """
fraud:
  unit: [header:x-user-id, field:customer, request]
  rules:
    - {name: internal, when: {header: {x-cohort: beta}}, to: challenger}
    - name: big
      when: {rows: {gte: 1000}, field: {country: [de, at], amount: {gt: 5}}}
      to: champion
    - {name: known, when: {header: {x-key: {present: true}, x-agent: {prefix: bot}}}, to: 7}
  split:
    - {to: champion, weight: rest}
    - {to: challenger, weight: 5}
    - {to: 7, weight: 0.25}
  shadow:
    - {to: 10, sample: 25, inflight_max: 4, deadline_s: 0.5, compare: {score: {atol: 0.01}}}
  fallback: {on: [error, timeout, breaker], to: [previous], max_hops: 1}
  breaker: {requests_min: 30}
  timeout_s: 0.3
  limits: {rows_max: 5000, inflight_max: 64, queue_rows_max: 8192, rate_per_s_max: 200}
  batch: {rows_max: 64, wait_s_max: 0}
  capture: {sample: 2.50}
  allow_override: true
"""


def test_a_whole_document_is_read_and_comes_back_as_it_was() -> None:
    """YAML, its canonical JSON and the bytes of a revision are the same route."""
    route = routes.parse(FULL)["fraud"]

    assert route.rules[1].when.field["amount"] == Range(gt=5)
    assert route.split[1].weight == 5
    assert route.fallback is not None
    assert route.fallback.on == ("error", "timeout", "breaker")  # not YAML 1.1's "true"
    canonical = routes.document(route)
    assert routes.parse({"fraud": canonical}) == {"fraud": route}
    assert routes.parse(json.dumps({"fraud": canonical})) == {"fraud": route}
    encoded = msgspec.json.encode(route)
    assert msgspec.json.decode(encoded, type=Route) == route
    assert msgspec.json.encode(msgspec.json.decode(encoded, type=Route)) == encoded


def test_weights_are_buckets_and_the_rest_is_what_is_left() -> None:
    """Percent with two decimals are exact: a bucket is a hundredth of a percent."""
    route = routes.parse(FULL)["fraud"]

    assert routes.weights(route) == {"champion": 9475, "challenger": 500, "7": 25}
    assert routes.base(route) == "champion"
    assert routes.weights(Route()) == {"champion": 10_000}


def test_a_table_follows_its_route_from_the_table_before() -> None:
    """A route without a table starts from its base; later ones move what the weights say."""
    route = routes.parse(FULL)["fraud"]
    first = routes.table(route, "", b"seed")

    assert first.weights() == routes.weights(route)
    assert routes.table(route, first.format(), b"seed").format() == first.format()
    assert routes.table(Route(), first.format(), b"seed").weights() == {"champion": 10_000}


def test_everything_that_is_wrong_is_said_at_once() -> None:
    """Where, what, and what was probably meant; in the order of the document."""
    with pytest.raises(RouteError) as caught:
        routes.parse("""
fraud:
  units: [a]
  rules:
    - {name: "1", wen: {}, to: 3}
    - {name: x, when: {header: {x-a: 1}}, to: "9"}
    - {name: z, when: {rows: {gte: lots}}, to: 0}
    - {name: z, when: {}, to: champion}
  split: [{to: champion, weight: 90}, {to: challenger, weight: 5.125}]
  shadow: nope
  fallback: {on: [eror], to: [previous], max_hops: 2}
  timeout_s: 0
x y: {}
sums: {split: [{to: champion, weight: 90}, {to: challenger, weight: 5}]}
rests: {split: [{to: champion, weight: rest}, {to: challenger, weight: rest}]}
full: {split: [{to: champion, weight: rest}, {to: a, weight: 60}, {to: b, weight: 50}]}
""")

    assert caught.value.problems == (
        "fraud.units: no such field; did you mean unit?",
        "fraud.rules[0].wen: no such field; did you mean when?",
        "fraud.rules[0]: needs when",
        "fraud.rules[1].when.header.x-a: must be text or a mapping or a list, not a whole number",
        "fraud.rules[1].to: '9' is no alias; a version is a number, without quotes: 9",
        "fraud.rules[2].when.rows.gte: must be a number or nothing, not text",
        "fraud.rules[2].to: 0 is no version (1, 2, 3, ...)",
        "fraud.rules[3].when: is empty, so every request matches: use split",
        "fraud.split[1].weight: 5.125: percent has two decimals at most",
        "fraud.shadow: must be a list, not text",
        "fraud.fallback.on[0]: must be one of error, timeout, breaker",
        "fraud.timeout_s: 0: must be seconds, more than 0 and at most 3600",
        "'x y': cannot be the name of a model",
        "sums.split: weights add up to 95 percent (90 + 5), not to 100; one of them can be rest",
        "rests.split: only one weight can be rest",
        "full.split: weights add up to 110 percent (60 + 50): no rest is left",
    )


@pytest.mark.parametrize(
    ("part", "says"),
    [
        ("unit: []", "is empty"),
        ("unit: [request, header:x-a]", "never looked at"),
        ("unit: [header:X-User]", "lower case"),
        ("unit: [json:/customer]", "say field:customer"),
        ("unit: [cookie:a]", "must be header:NAME, field:NAME or request"),
        ("unit: [header:a, header:a]", "there twice"),
        ("split: [{to: a, weight: 50}, {to: a, weight: 50}]", "'a' is there twice"),
        ("split: [{to: a, weight: -1}, {to: b, weight: 101}]", "percent from 0 to 100"),
        ("split: [{to: a, weight: some}]", "a number, or one of rest"),
        ("split: [{to: a}]", "needs weight"),
        ("split: [{to: a, weight: 1e400}]", "finite"),
        ("shadow: [{to: 1, disagreement_max: 0}]", "more than 0"),
        ("shadow: [{to: 1, inflight_max: 0}]", "at least 1"),
        ("shadow: [{to: 1, compare: {score: {atol: -1}}}]", "atol: -1: must be at least 0"),
        ("fallback: {to: []}", "must not be empty"),
        ("fallback: {to: [previous], max_hops: 2}", "one hop is all there is"),
        ("breaker: {}", "write fallback: {on: [breaker], to: [previous]}"),
        ("breaker: {}, fallback: {to: [previous]}", "{on: [error, timeout, breaker], to"),
        ("fallback: {on: [error, breaker], to: [1]}", "write breaker: {} beside it"),
        ("limits: {rows_max: 9, queue_rows_max: 8}", "never finds room (queue_rows_max is 8)"),
        ("batch: {rows_max: 1, wait_s_max: 0.1}", "no company to wait for"),
        ("batch: {wait_s_max: 2}, timeout_s: 2", "no answer within timeout_s (2)"),
        ("limits: {burst_max: 5}", "needs rate_per_s_max"),
        ("batch: {wait_s_max: 11}", "at most 10"),
        ("capture: {}", "needs sample"),
        ("timeout_s: .nan", "must be a number"),
        ("allow_override: yes", "must be true or false"),
        ("rules: [{name: a, to: 1, when: {field: {f: {}}}}]", "is empty"),
    ],
)
def test_what_types_do_not_say_is_checked_too(part: str, says: str) -> None:
    """Each value in itself, and those that must go together."""
    with pytest.raises(RouteError, match=r"^m") as caught:
        routes.parse(f"m: {{{part}}}")
    assert says in str(caught.value)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("a: [1", "line 1"),
        ("a: {}\na: {}", "line 2: 'a' is given twice"),
        ("x: &a {}\ny: *a", "anchors are not read"),
        ("", "maps models to routes"),
        ("[]", "maps models to routes"),
        ("[" * 5000, "not YAML"),
        (b"\xff", "not YAML"),
        ("#" * 1_100_000, "longer than"),
    ],
)
def test_a_text_that_is_no_document_is_refused(text: str | bytes, says: str) -> None:
    """Syntax with its line; no anchors, so that a short text cannot stand for a long one."""
    with pytest.raises(RouteError) as caught:
        routes.parse(text)
    assert says in str(caught.value)


def test_names_that_nothing_has_are_found() -> None:
    """Aliases with the nearest one; champion is there before anybody has named it."""
    route = routes.parse(FULL)["fraud"]

    assert routes.check_targets("fraud", route, {"challenge": 7, "previous": 6}, {6, 7}) == [
        "fraud.rules[0].to: there is no alias 'challenger'; did you mean challenge?",
        "fraud.split[1].to: there is no alias 'challenger'; did you mean challenge?",
        "fraud.shadow[0].to: there is no version 10",
    ]


_json = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5)
    | st.sampled_from(["rest", "champion", "request", "error"]),
    lambda inner: st.lists(inner, max_size=3)
    | st.dictionaries(
        st.sampled_from(["to", "weight", "name", "when", "header", "field", "rows", "gte", "x"]),
        inner, max_size=3,
    ),
    max_leaves=8,
)  # fmt: skip


@settings(max_examples=150, deadline=None)
@given(st.dictionaries(st.sampled_from(Route.__struct_fields__), _json, max_size=4))
def test_whatever_comes_is_a_sound_route_or_problems(tree: dict[str, object]) -> None:
    """Reading never fails in another way, and what is read adds up and comes back."""
    try:
        route = routes.parse_one("m", tree)
    except RouteError as error:
        problems = error.problems
    else:
        assert sum(routes.weights(route).values()) == 10_000
        assert routes.parse_one("m", routes.document(route)) == route
        return
    assert problems
    assert all(problem.startswith("m") for problem in problems)
