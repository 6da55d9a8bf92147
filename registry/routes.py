"""Route documents: how a model's traffic is split, as people write it, in YAML or JSON.

Reading says every problem at once: where, what, and the name that was probably meant. Weights that
do not add up are refused with their sum, never made to fit. A route names aliases and versions; the
bucket table and the salts that go with it are written by the tool, beside it, into a revision.
"""

import json
import math
import re
import types
import typing
from collections.abc import Callable, Container, Iterable, Iterator, Mapping
from difflib import get_close_matches
from typing import Annotated, Any, Literal

import msgspec
import yaml

from registry import buckets, names
from registry.errors import RegistryError

UNIT_REQUEST = "request"
PURPOSES = ("split", "shadow", "capture")
"""What salts are for: who is split, shadowed and captured are independent of each other."""
CHAMPION = "champion"
_TEXT_BYTES_MAX = 1024 * 1024
_ENTRIES_MAX = 64
_TOKEN = re.compile(r"[A-Za-z0-9!#$%&'*+.^_`|~-]{1,128}", re.ASCII)
_ALIAS = re.compile(r"[A-Za-z][A-Za-z0-9_-]{0,63}", re.ASCII)

Target = int | str
"""An alias, or the number of a version."""
Percent = int | float
"""0 to 100, with two decimals at most."""
Text = Annotated[str, msgspec.Meta(max_length=256)]
Scalar = bool | int | float | Text


class RouteError(RegistryError):
    """A route document is wrong. `problems` holds everything that is."""

    def __init__(self, *problems: str) -> None:
        self.problems = problems
        super().__init__("; ".join(problems))


class _Part(
    msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True
):
    """A mapping of a route document."""


Part = _Part
"""What mappings of other documents are made of, so that `read_part` reads them."""
_Kind = typing.TypeVar("_Kind", bound=_Part)


class HeaderMatch(_Part, frozen=True):
    """What a header must be, where equality is not enough."""

    prefix: Text | None = None
    """How its value starts."""
    present: bool | None = None
    """Whether it is there at all."""


class Range(_Part, frozen=True):
    """A range of numbers; all bounds that are given hold."""

    gte: float | None = None
    """At least."""
    gt: float | None = None
    """More than."""
    lte: float | None = None
    """At most."""
    lt: float | None = None
    """Less than."""


class When(_Part, frozen=True):
    """What a rule looks for; everything that is given must hold."""

    header: dict[str, Text | tuple[Text, ...] | HeaderMatch] = {}
    """By name: a value, several of which one must be equal, `{prefix: ...}`, `{present: ...}`."""
    field: dict[str, Scalar | tuple[Scalar, ...] | Range] = {}
    """By name of a request parameter, else of an input of one element: a value, several, or a
    range (`gte`, `gt`, `lte`, `lt`)."""
    rows: int | Range | None = None
    """Rows of the request: a number, or a range."""


class Rule(_Part, frozen=True):
    """Requests that go elsewhere whatever their bucket; the first rule that matches counts."""

    name: str
    """Said in the decision: `RULE_MATCH(internal)`."""
    when: When
    """What the request must be like."""
    to: Target
    """The variant that answers it."""


class Share(_Part, frozen=True):
    """A variant and how much of the traffic it answers."""

    to: Target
    """An alias or a version number."""
    weight: int | float | Literal["rest"]
    """Percent with two decimals; one may be `rest`. 0: loaded, without traffic."""


class Tolerance(_Part, frozen=True):
    """When two values of one output agree."""

    atol: float = 0.000001
    """Numbers may differ by so much,"""
    rtol: float = 0.001
    """and by so much of the first one's size, together."""
    threshold: float | None = None
    """Only the side of this number counts: both below, or both at least it."""


class Shadow(_Part, frozen=True):
    """A variant that gets copies and answers nobody."""

    to: Target
    """An alias or a version number."""
    sample: Percent = 100
    """Percent of units that are copied to it."""
    inflight_max: int = 4
    """Copies of requests that may wait for it or run; more are dropped and counted."""
    bytes_max: int = 64 * 1024 * 1024
    """Bytes of tensors that these may hold."""
    deadline_s: float = 0.5
    """A copy that waited longer is dropped and counted."""
    compare: dict[str, Tolerance] = {}
    """By output; outputs that are not named are compared by the default tolerance."""
    disagreement_max: Percent = 2
    """Percent of units that may disagree before the report says so."""


class Fallback(_Part, frozen=True):
    """Who answers when the variant that should cannot."""

    to: tuple[Target, ...]
    """In this order; the first that is another version and can answer is asked."""
    on: tuple[Literal["error", "timeout", "breaker"], ...] = ("error", "timeout")
    """What makes a request hop; `breaker`: that of the variant is open."""
    max_hops: int = 1
    """Hops of a request: one is all there is."""


class Breaker(_Part, frozen=True):
    """When a worker stops asking a variant for a while. It never stops asking the last one."""

    requests_min: int = 20
    """Fewer requests in the window judge nothing."""
    error_share: Percent = 50
    """Percent of them that failed: from here on it is open."""
    window_s: float = 10.0
    """Seconds that are looked back."""
    open_s: float = 5.0
    """Seconds until requests are let through again, to probe."""
    probes: int = 3
    """So many of these must succeed, in a row, to close it."""


class Limits(_Part, frozen=True):
    """What this model's requests may take of a worker, so that others get their share."""

    rows_max: int | None = None
    """Rows in one request; more are answered 413."""
    inflight_max: int | None = None
    """Requests at a time; more are answered 429."""
    queue_rows_max: int | None = None
    """Rows that may wait for one version; more are answered 429."""
    rate_per_s_max: float | None = None
    """Requests a second of one key (of all who show none, together), over all workers of a host;
    more are answered 429."""
    burst_max: int | None = None
    """Requests that may come at once under that rate; by default one second's worth."""


class Batch(_Part, frozen=True):
    """Over the settings `batch.*`, for this model."""

    rows_max: int | None = None
    """Rows in one batch at most; 1 turns batching off."""
    wait_s_max: float | None = None
    """Longest time a first row waits although the session is idle."""


class Capture(_Part, frozen=True):
    """Requests and answers that are kept on disk, to be looked at, replayed and simulated."""

    sample: Percent
    """Percent of units that are captured."""
    inputs: bool = True
    """Keep the input tensors. Without them nothing can be replayed."""
    outputs: bool = True
    """Keep the output tensors."""
    units: bool = False
    """Keep the units themselves, which may be personal data, beside their hashes."""
    also: tuple[str, ...] = ()
    """`header:NAME` and `field:NAME` to keep beyond what rules look at: what a route to come may
    look at."""
    redact: tuple[str, ...] = ()
    """`header:NAME` and `field:NAME` (a request parameter, or an input) to keep nothing of, not
    even a hash; of a unit its bucket stays."""


class Route(_Part, frozen=True):
    """How one model's traffic is split."""

    unit: tuple[str, ...] = (UNIT_REQUEST,)
    """What is sticky, the first that a request has: `header:NAME`, `field:NAME`, `request`."""
    rules: tuple[Rule, ...] = ()
    """In order; the first that matches decides."""
    split: tuple[Share, ...] = ()
    """Shares of all requests that no rule takes; empty: the champion answers them."""
    shadow: tuple[Shadow, ...] = ()
    """Variants that get copies."""
    fallback: Fallback | None = None
    """Who answers when the variant cannot."""
    breaker: Breaker | None = None
    """When a variant is left alone for a while; needs a fallback."""
    timeout_s: float | None = None
    """Longest time to an answer, over the setting `limits.timeout_s`."""
    limits: Limits | None = None
    """What the model may take."""
    batch: Batch | None = None
    """How rows are batched."""
    capture: Capture | None = None
    """What is kept for replay."""
    allow_override: bool = False
    """Clients may name the variant, in the header `x-driftgate-version`."""


PARTS: tuple[type[_Part], ...] = (
    Route, Rule, When, HeaderMatch, Range, Share, Shadow, Tolerance, Fallback, Breaker, Limits,
    Batch, Capture,
)  # fmt: skip
"""Every mapping there is: docs/reference/route-format.md lists their fields, a test compares."""


def parse(source: str | bytes | Mapping[str, Any]) -> dict[str, Route]:
    """The routes of a document, by model.

    Parameters
    ----------
    source : YAML or JSON text, or what such a text holds

    Raises
    ------
    RouteError : every problem at once.
    """
    tree = read_text(source) if isinstance(source, str | bytes) else source
    if not isinstance(tree, Mapping):
        raise RouteError(f"a route document maps models to routes; this is {_kind(tree)}")
    problems: list[str] = []
    routes: dict[str, Route] = {}
    for name, value in tree.items():
        where = str(name)[:128]
        if not isinstance(name, str) or not names.is_model(name):
            problems.append(f"{where!r}: cannot be the name of a model")
            continue
        if (route := _route(value, where, problems)) is not None:
            routes[name] = route
    if problems:
        raise RouteError(*problems)
    return routes


def parse_one(model: str, value: object) -> Route:
    """The route of one model, from what its part of a document holds.

    Raises
    ------
    RouteError : every problem at once.
    """
    problems: list[str] = []
    route = _route(value, model, problems)
    if problems or route is None:
        raise RouteError(*problems)
    return route


def read_part(kind: type[_Kind], value: object, where: str) -> tuple[_Kind | None, list[str]]:
    """A mapping of another document, read as strictly as a route, and every problem in it."""
    problems: list[str] = []
    part: _Kind | None = _read(kind, value, where, problems)
    return part, problems


def document(route: Route) -> dict[str, Any]:
    """The canonical form, ready for JSON; reading it gives the same route."""
    tree: dict[str, Any] = msgspec.to_builtins(route)
    return tree


def read_text(text: str | bytes) -> object:
    """What a YAML or JSON text holds.

    Raises
    ------
    RouteError : it cannot be read, with the line.
    """
    if len(text) > _TEXT_BYTES_MAX:
        raise RouteError(f"the document is longer than {_TEXT_BYTES_MAX} bytes")
    try:
        found: object = yaml.load(text, _Loader)  # noqa: S506  a safe loader, with fewer types
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"line {mark.line + 1}: " if mark else ""
        said = getattr(error, "problem", None) or "not YAML"
        raise RouteError(f"{where}{said}") from None
    except (ValueError, RecursionError):
        raise RouteError("not YAML that can be read") from None
    return found


def is_alias(name: str) -> bool:
    """Whether `name` may name a version: a letter, then letters, digits, `_`, `-`; up to 64."""
    return _ALIAS.fullmatch(name) is not None


def weights(route: Route) -> dict[str, int]:
    """Buckets of each variant of the split, by name; they add up to 10 000."""
    if not route.split:
        return {CHAMPION: buckets.N}
    given = {str(share.to): _hundredths(share.weight) for share in route.split}
    left = buckets.N - sum(n for n in given.values() if n is not None)
    return {name: left if n is None else n for name, n in given.items()}


def base(route: Route) -> str:
    """The variant that others grow from: the one with the rest, else the first of the split."""
    for share in route.split:
        if share.weight == "rest":
            return str(share.to)
    return str(route.split[0].to) if route.split else CHAMPION


def table(route: Route, before: str, seed: bytes) -> buckets.Buckets:
    """The bucket table for a route, moved as little as possible from the one before.

    Parameters
    ----------
    before : the table so far as text; empty: there is none
    """
    first = buckets.Buckets.parse(before) if before else buckets.Buckets.all_to(base(route))
    return first.moved_to(weights(route), seed, base(route))


def sources(route: Route) -> set[str]:
    """What the rules of a route look at, beside the number of rows: `header:NAME`, `field:NAME`."""
    return {
        f"{kind}:{name}"
        for rule in route.rules
        for kind, tests in (("header", rule.when.header), ("field", rule.when.field))
        for name in tests
    }


def targets(route: Route) -> Iterator[tuple[str, Target]]:
    """Every alias or version that a route names, with where it does."""
    for k, rule in enumerate(route.rules):
        yield f"rules[{k}].to", rule.to
    for k, share in enumerate(route.split):
        yield f"split[{k}].to", share.to
    for k, shadow in enumerate(route.shadow):
        yield f"shadow[{k}].to", shadow.to
    for k, to in enumerate(route.fallback.to if route.fallback else ()):
        yield f"fallback.to[{k}]", to


def check_targets(
    model: str, route: Route, aliases: Mapping[str, int], versions: Container[int]
) -> list[str]:
    """Problems of a route that names what is not there."""
    problems: list[str] = []
    for where, to in targets(route):
        if isinstance(to, int):
            if to not in versions:
                problems.append(f"{model}.{where}: there is no version {to}")
        elif to not in aliases and to != CHAMPION:
            problems.append(f"{model}.{where}: there is no alias {to!r}{_suggestion(to, aliases)}")
    return problems


# -- reading


class _Loader(yaml.SafeLoader):
    """YAML 1.2's plain types (`on` is a text, `1:30` too), no key twice, no anchors."""

    yaml_implicit_resolvers: typing.ClassVar[dict[str, list[tuple[str, re.Pattern[str]]]]] = {}  # type: ignore[misc]  # an attribute of theirs without a type

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            raise yaml.MarkedYAMLError(
                problem="anchors are not read here: write it out",
                problem_mark=self.peek_event().start_mark,  # type: ignore[no-untyped-call]  # theirs
            )
        return super().compose_node(parent, index)

    def construct_mapping(self, node: Any, deep: bool = False) -> Any:
        seen: set[str] = set()
        for key, _ in node.value:
            if str(key.value) in seen:
                raise yaml.MarkedYAMLError(
                    problem=f"{key.value!r} is given twice", problem_mark=key.start_mark
                )
            seen.add(str(key.value))
        return super().construct_mapping(node, deep)


for _tag, _pattern, _first in (
    ("bool", r"true|True|TRUE|false|False|FALSE", "tTfF"),
    ("null", r"~|null|Null|NULL|", "~nN\0"),
    ("int", r"[-+]?[0-9]+", "-+0123456789"),
    ("float", r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?", "-+.0123456789"),
):
    _Loader.add_implicit_resolver(
        f"tag:yaml.org,2002:{_tag}",
        re.compile(f"^(?:{_pattern})$"),
        ["" if c == "\0" else c for c in _first],
    )


def _route(value: object, where: str, problems: list[str]) -> Route | None:
    n_problems = len(problems)
    route = _read(Route, value, where, problems)
    return route if isinstance(route, Route) and len(problems) == n_problems else None


def _read(kind: Any, value: object, where: str, problems: list[str]) -> Any:
    """The value as this type; what is wrong in it is added to `problems`, and None comes back."""
    is_union = typing.get_origin(kind) in (typing.Union, types.UnionType)
    members = typing.get_args(kind) if is_union else (kind,)
    if value is None and types.NoneType in members:
        return None
    for member in members:
        if isinstance(member, type) and issubclass(member, _Part) and isinstance(value, Mapping):
            return _read_part(member, value, where, problems)
    origin, inner = typing.get_origin(members[0]), typing.get_args(members[0])
    if len(members) == 1 and origin is tuple and isinstance(value, list | tuple):
        if len(value) > _ENTRIES_MAX:
            problems.append(f"{where}: {len(value)} entries; {_ENTRIES_MAX} are allowed")
            return None
        items = [_read(inner[0], v, f"{where}[{k}]", problems) for k, v in enumerate(value)]
        return tuple(items) if None not in items else None
    if origin is dict and isinstance(value, Mapping):
        found = {str(k): _read(inner[1], v, f"{where}.{k}", problems) for k, v in value.items()}
        return found if None not in found.values() else None
    if isinstance(members[0], type) and issubclass(members[0], _Part):
        problems.append(f"{where}: must be a mapping, not {_kind(value)}")
        return None
    return _convert(kind, value, where, problems)


def _convert(kind: Any, value: object, where: str, problems: list[str]) -> Any:
    try:
        converted = msgspec.convert(value, kind)
    except msgspec.ValidationError as error:
        problems.append(f"{where}: {_plain(str(error), kind)}")
        return None
    if isinstance(converted, float) and not math.isfinite(converted):
        problems.append(f"{where}: must be a finite number")
        return None
    if kind == Target:
        problems.extend(f"{where}{problem}" for problem in _target(converted))
    is_whole = isinstance(converted, float) and converted.is_integer()
    return int(converted) if is_whole and int in typing.get_args(kind) else converted


def _read_part(
    kind: type[_Part], value: Mapping[Any, Any], where: str, problems: list[str]
) -> _Part | None:
    fields = {entry.name: entry for entry in msgspec.structs.fields(kind)}
    n_problems = len(problems)
    found: dict[str, Any] = {}
    for name, given in value.items():
        if name not in fields:
            problems.append(f"{where}.{name}: no such field{_suggestion(str(name), fields)}")
            continue
        read = _read(fields[name].type, given, f"{where}.{name}", problems)
        if read is not None:
            found[name] = read
    missing = [name for name, entry in fields.items() if entry.required and name not in value]
    if missing:
        problems.append(f"{where}: needs {' and '.join(missing)}")
    if len(problems) > n_problems and kind is not Route:
        return None
    part = kind(**found)  # Of a route, whatever was readable is looked at.
    if (check := _CHECKS.get(kind)) is not None:
        problems.extend(f"{where}{problem}" for problem in check(part))
    return part if len(problems) == n_problems else None


def _check_route(route: Route) -> Iterator[str]:
    yield from _check_units(route.unit)
    for kind, given in (
        ("rules", [rule.name for rule in route.rules]),
        ("split", [str(share.to) for share in route.split]),
        ("shadow", [str(shadow.to) for shadow in route.shadow]),
    ):
        for k, name in enumerate(given):
            if name in given[:k]:
                yield f".{kind}[{k}]: {name!r} is there twice"
    yield from _check_sum(route.split)
    on = route.fallback.on if route.fallback else ()
    if route.breaker and "breaker" not in on:
        yield (
            ".breaker: needs a fallback for it, else nobody would answer: write"
            f" fallback: {{on: [{', '.join((*on, 'breaker'))}], to: [previous]}}"
        )
    if "breaker" in on and not route.breaker:
        yield ".fallback.on: breaker: there is none; write breaker: {} beside it, or leave it out"
    if route.timeout_s is not None:
        yield from _seconds(route, "timeout_s")
        if route.batch and (route.batch.wait_s_max or 0) >= route.timeout_s:
            yield (
                f".batch.wait_s_max: {route.batch.wait_s_max:g}: a request that waits so long"
                f" has no answer within timeout_s ({route.timeout_s:g})"
            )


def _check_units(units: tuple[str, ...]) -> Iterator[str]:
    if not units:
        yield ".unit: is empty; leave it out, or name what is sticky"
    for k, unit in enumerate(units):
        kind, _, name = unit.partition(":")
        if unit in units[:k]:
            yield f".unit[{k}]: {unit[:80]!r} is there twice"
        elif unit == UNIT_REQUEST:
            if k < len(units) - 1:
                yield f".unit[{k}]: every request has itself: what follows is never looked at"
        elif kind == "json":
            yield f".unit[{k}]: say field:{name.strip('/') or 'NAME'}, which every protocol has"
        elif kind not in ("header", "field"):
            yield f".unit[{k}]: {unit[:80]!r} must be header:NAME, field:NAME or request"
        else:
            yield from _check_source(f".unit[{k}]", unit)


def _check_source(where: str, source: str) -> Iterator[str]:
    """`header:NAME` or `field:NAME`."""
    kind, _, name = source.partition(":")
    if kind not in ("header", "field"):
        yield f"{where}: {source[:80]!r} must be header:NAME or field:NAME"
    elif not name or (kind == "header" and not _is_header(name)):
        yield f"{where}: {source[:80]!r} names no {kind} (headers in lower case)"


def _check_sum(split: tuple[Share, ...]) -> Iterator[str]:
    numbers = [n for share in split if (n := _hundredths(share.weight)) is not None]
    n_rest = len(split) - len(numbers)
    if n_rest > 1:
        yield ".split: only one weight can be rest"
    if not split:
        return
    total, said = sum(numbers), " + ".join(f"{n / 100:g}" for n in numbers)
    if n_rest and total > buckets.N:
        yield f".split: weights add up to {total / 100:g} percent ({said}): no rest is left"
    elif not n_rest and total != buckets.N:
        yield (
            f".split: weights add up to {total / 100:g} percent ({said}), not to 100;"
            " one of them can be rest"
        )


def _check_rule(rule: Rule) -> Iterator[str]:
    if not is_alias(rule.name):
        yield f".name: {rule.name[:80]!r}: letters, digits, '_' and '-', from a letter on"


def _check_when(when: When) -> Iterator[str]:
    if not when.header and not when.field and when.rows is None:
        yield ": is empty, so every request matches: use split"
    for name, test in when.header.items():
        if not _is_header(name):
            yield f".header.{name}: names no header (in lower case)"
        if test == ():
            yield f".header.{name}: is empty"
    for name, condition in when.field.items():
        if condition == ():
            yield f".field.{name}: is empty"


def _check_bounds(part: HeaderMatch | Range) -> Iterator[str]:
    if part == type(part)():
        yield ": is empty"


def _check_share(share: Share) -> Iterator[str]:
    if share.weight != "rest":
        yield from _percent(share, "weight")


def _check_shadow(shadow: Shadow) -> Iterator[str]:
    yield from _percent(shadow, "sample")
    yield from _percent(shadow, "disagreement_max")
    if shadow.disagreement_max in (0, 100):
        yield ".disagreement_max: must be more than 0 and less than 100"
    yield from _at_least(shadow, inflight_max=1, bytes_max=1)
    yield from _seconds(shadow, "deadline_s")


def _check_fallback(fallback: Fallback) -> Iterator[str]:
    if not fallback.to or not fallback.on:
        yield ": 'to' and 'on' must not be empty"
    if fallback.max_hops != 1:
        yield f".max_hops: {fallback.max_hops}: one hop is all there is"


def _check_breaker(breaker: Breaker) -> Iterator[str]:
    yield from _percent(breaker, "error_share")
    if breaker.error_share == 0:
        yield ".error_share: must be more than 0"
    yield from _at_least(breaker, requests_min=1, probes=1)
    yield from _seconds(breaker, "window_s")
    yield from _seconds(breaker, "open_s")


def _check_limits(limits: Limits) -> Iterator[str]:
    yield from _at_least(
        limits, rows_max=1, inflight_max=1, queue_rows_max=1, rate_per_s_max=0.001, burst_max=1
    )
    if limits.burst_max is not None and limits.rate_per_s_max is None:
        yield ".burst_max: needs rate_per_s_max"
    rows_max, queue_rows_max = limits.rows_max, limits.queue_rows_max
    if rows_max is not None and queue_rows_max is not None and rows_max > queue_rows_max:
        yield f".rows_max: {rows_max}: never finds room (queue_rows_max is {queue_rows_max})"


def _check_batch(batch: Batch) -> Iterator[str]:
    yield from _at_least(batch, rows_max=1, wait_s_max=0)
    if (batch.wait_s_max or 0) > 10:
        yield f".wait_s_max: {batch.wait_s_max:g}: must be at most 10"
    if batch.wait_s_max and batch.rows_max == 1:
        yield ".wait_s_max: with rows_max 1 there is no company to wait for"


def _check_capture(capture: Capture) -> Iterator[str]:
    yield from _percent(capture, "sample")
    for field in ("also", "redact"):
        for k, source in enumerate(getattr(capture, field)):
            yield from _check_source(f".{field}[{k}]", source)


_CHECKS: dict[type[_Part], Callable[[Any], Iterator[str]]] = {
    Route: _check_route,
    Rule: _check_rule,
    When: _check_when,
    HeaderMatch: _check_bounds,
    Range: _check_bounds,
    Share: _check_share,
    Shadow: _check_shadow,
    Tolerance: lambda tolerance: _at_least(tolerance, atol=0, rtol=0),
    Fallback: _check_fallback,
    Breaker: _check_breaker,
    Limits: _check_limits,
    Batch: _check_batch,
    Capture: _check_capture,
}
"""What types do not say, by kind of part; each problem starts with where in the part it is."""


def _target(to: Target) -> Iterator[str]:
    if isinstance(to, int):
        if names.version(str(to)) is None:
            yield f": {to} is no version (1, 2, 3, ...)"
    elif not is_alias(to):
        number = names.version(to)
        hint = f"; a version is a number, without quotes: {number}" if number else ""
        yield f": {to[:80]!r} is no alias{hint}"


def _percent(part: _Part, name: str) -> Iterator[str]:
    value = getattr(part, name)
    if not 0 <= value <= 100:
        yield f".{name}: {value:g}: must be percent from 0 to 100"
    elif abs(value * 100 - round(value * 100)) > 1e-6:
        yield f".{name}: {value}: percent has two decimals at most"


def _at_least(part: _Part, **bounds: float) -> Iterator[str]:
    for name, low in bounds.items():
        value = getattr(part, name)
        if value is not None and value < low:
            yield f".{name}: {value:g}: must be at least {low:g}"


def _seconds(part: _Part, name: str) -> Iterator[str]:
    value = getattr(part, name)
    if not 0 < value <= 3600:
        yield f".{name}: {value:g}: must be seconds, more than 0 and at most 3600"


def _hundredths(weight: float | str) -> int | None:
    return None if isinstance(weight, str) else round(weight * 100)


def _is_header(name: str) -> bool:
    return _TOKEN.fullmatch(name) is not None and name == name.lower()


def _kind(value: object) -> str:
    if isinstance(value, str):
        return f"the text {json.dumps(value[:40])}"
    return "nothing" if value is None else f"a {type(value).__name__}"


_KINDS = {"str": "text", "int": "a whole number", "float": "a number", "bool": "true or false",
          "array": "a list", "object": "a mapping", "null": "nothing"}  # fmt: skip


def _plain(text: str, kind: Any) -> str:
    """The sentence of msgspec in this document's words."""
    if "enum" in text:
        choices = [c for m in (kind, *typing.get_args(kind)) for c in typing.get_args(m)]
        first = "a number, or " if float in choices or int in typing.get_args(kind) else ""
        return f"must be {first}one of {', '.join(c for c in choices if isinstance(c, str))}"
    said = text.replace("Expected", "must be").replace("got", "not")
    for name, plain in _KINDS.items():
        said = re.sub(rf"(?<=[`| ]){name}(?=[`| ])", plain, said)
    return said.replace("`", "").replace(" | ", " or ").removesuffix(" - at $")


def _suggestion(name: str, known: Iterable[str]) -> str:
    listed = list(known)
    if match := get_close_matches(name[:128], listed, n=1, cutoff=0.6):
        return f"; did you mean {match[0]}?"
    return f"; there are: {', '.join(listed)}" if listed else "; there are none"
