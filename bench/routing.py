"""What routing costs a request.

Question  Do a rule, a sticky unit, its bucket and the decision header cost 3 us at most?
Method    Best of 7 runs of 20 000 picks with 8 headers, each with its header written.
Budget    3 us a request.
Run       make bench NAME=routing
"""

import timeit

from gateway.router import Routing
from gateway.telemetry import Telemetry
from registry import routes
from registry.revisions import ModelState

N = 20_000
ROUTE = {
    "unit": ["header:x-user-id", "request"],
    "rules": [{"name": "beta", "when": {"header": {"x-cohort": "beta"}}, "to": "challenger"}],
    "split": [{"to": "champion", "weight": "rest"}, {"to": "challenger", "weight": 5}],
}
HEADERS = [(b"x-%d" % k, b"value") for k in range(7)] + [(b"x-user-id", b"user-1234567")]


def main() -> None:
    """Print the seconds of one pick."""
    route = routes.parse_one("m", ROUTE)
    state = ModelState(
        follow=False,
        aliases={"champion": 7, "challenger": 9},
        route=route,
        salts={"split": "00" * 16},
        buckets=routes.table(route, "", b"seed").format(),
    )
    routing = Routing("m", state, 42, Telemetry())
    sticky, drawn = (
        min(timeit.repeat(lambda: routing.pick(headers, None).header, number=N, repeat=7)) / N * 1e6  # noqa: B023  called at once
        for headers in (HEADERS, HEADERS[:-1])
    )
    print(f"routing: {sticky:.2f} us with a sticky unit, {drawn:.2f} us drawn; budget 3 us")


if __name__ == "__main__":
    main()
