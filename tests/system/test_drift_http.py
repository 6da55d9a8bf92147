"""What the monitors see, asked over a real socket: drift, its absence, and every row accounted."""

import json
import math
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from prometheus_client.parser import text_string_to_metric_families

from monitors import Profile
from tests import models
from tests.serving import Server, driftgate, request, serve, tensor, wait_until

WINDOW = 500
N_REFERENCE = 5000
LEVELS, SHARES = ["a", "b", "c"], [0.6, 0.3, 0.1]
Rows = dict[str, Any]


def draw_rows(n: int, seed: int, shift: float = 0.0) -> Rows:
    """Rows of the model `mixed`: a normal amount, a Poisson count, a place of three."""
    draw = np.random.default_rng(seed)
    return {
        "amount": draw.normal(shift, 1, size=n).astype(np.float32),
        "count": draw.poisson(5, size=n),
        "place": draw.choice(LEVELS, size=n, p=SHARES),
    }


def reference(**more: Any) -> str:
    """The profile of unshifted rows, inputs and one output."""
    rows = draw_rows(N_REFERENCE, seed=7)
    columns = {f"input:{name}": values for name, values in rows.items()}
    return Profile.fit({**columns, "output:twice": rows["amount"] * 2, **more}).to_json()


def send(client: httpx.Client, model: str, rows: Rows, at_once: int = 50) -> None:
    """Ask for predictions of these rows, some at once."""
    n = len(rows["amount"])
    for start in range(0, n, at_once):
        part = slice(start, start + at_once)
        size = len(rows["amount"][part])
        body = request(
            tensor("amount", "FP32", [size], rows["amount"][part].tolist()),
            tensor("count", "INT64", [size], rows["count"][part].tolist()),
            tensor("place", "BYTES", [size], rows["place"][part].tolist()),
        )
        # NaN is a missing value; httpx would not write it.
        got = client.post(f"/v2/models/{model}/infer", content=json.dumps(body))
        assert got.status_code == 200, got.text


def report_of(client: httpx.Client, model: str, **query: str) -> dict[str, Any]:
    got = client.get(f"/drift/{model}", params=query)
    assert got.status_code == 200, got.text
    return got.json()  # type: ignore[no-any-return]  # JSON is Any


def channels_of(client: httpx.Client, model: str, **query: str) -> dict[str, dict[str, Any]]:
    return {c["name"]: c for c in report_of(client, model, **query)["report"]["channels"]}


def samples_of(client: httpx.Client, path: str = "/metrics") -> dict[tuple[str, ...], float]:
    """Every sample by name and label values in the order of the labels' names."""
    got = client.get(path)
    assert got.status_code == 200
    return {
        (sample.name, *(sample.labels[label] for label in sorted(sample.labels))): sample.value
        for family in text_string_to_metric_families(got.text)
        for sample in family.samples
    }


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    registry = tmp_path_factory.mktemp("registry")
    profile = reference()
    for name in ("steady", "shifted", "missing", "exact", "counted", "named"):
        directory = models.put(registry, name, 2, models.mixed())
        (directory / "reference.json").write_text(profile)
    older = models.put(registry, "named", 1, models.mixed())
    (older / "reference.json").write_text(profile)
    columns = {
        "input:amount": np.array(["low", "high"] * 50),  # a number for the model
        "input:count": np.arange(100),
        "input:colour": np.arange(100.0),  # nothing of the model's
    }
    partly = models.put(registry, "partly", 1, models.mixed())
    (partly / "reference.json").write_text(Profile.fit(columns).to_json())
    foreign = models.put(registry, "foreign", 1, models.identity())
    (foreign / "reference.json").write_text(Profile.fit({"input:z": np.arange(9.0)}).to_json())
    for name, text in BROKEN.items():
        broken = models.put(registry, name, 1, models.identity())
        (broken / "reference.json").write_bytes(text)
    models.put(registry, "without", 1, models.identity())
    for kind in models.ELEMENTS:
        models.put(registry, f"adopt-{kind}", 1, models.identity(kind))
    models.put(registry, "pictures", 1, models.identity("FP32", ("n", 2, 2)))
    models.put(registry, "lookup", 1, models.lookup())
    with serve(registry, {"monitor.window_rows": WINDOW}) as running:
        yield running


BROKEN = {
    "broken-text": b"not json at all",
    "broken-cut": b'{"format": 1, "n_rows": 100, "channels": [',
    "broken-newer": b'{"format": 999, "n_rows": 1, "lineage": {}, "channels": []}',
    "broken-bytes": bytes(range(256)),
    "broken-empty": b"",
    "broken-deep": b"[" * 100_000,
}


@pytest.fixture(scope="module")
def client(server: Server) -> Iterator[httpx.Client]:
    with server.client() as opened:
        yield opened


# -- drift and no drift


def test_shifted_rows_raise_one_page_on_what_shifted_only(client: httpx.Client) -> None:
    """N(1, 1) against N(0, 1): the index of the densities is exactly 1, of ten bins a bit less.

    One page names the input and the output made of it; it is acknowledged by its name.
    """
    send(client, "shifted", draw_rows(2 * WINDOW, seed=1, shift=1.0))
    second = report_of(client, "shifted")
    samples = samples_of(client)

    assert second["rows_observed"] == 2 * WINDOW
    # Whole blocks with at least a window of rows; on a busy machine one block may hold them all.
    assert WINDOW <= second["report"]["n_rows"] <= 2 * WINDOW
    assert not second["report"]["is_partial"]
    pages = [alarm for alarm in second["report"]["alarms"] if alarm["level"] == "page"]
    alarms = {alarm["channel"]: alarm for alarm in pages}
    assert {"input:amount", "output:twice"} <= set(alarms)
    assert {alarm["feature"] for alarm in pages} <= {"input:amount", "output:twice", ""}
    assert len({alarm["episode"] for alarm in pages}) == 1
    assert alarms["input:amount"]["since_row"] < WINDOW
    assert alarms["input:amount"]["evidence"] > 100
    assert samples["driftgate_alarms_total", "page", "shifted", "2"] == 1
    assert samples["driftgate_drift_evidence", "input:amount", "shifted", "2"] >= 0
    # One episode for all of them, which is seen by its name in the event log.
    (episode,) = client.get("/alarms", params={"model": "shifted"}).json()["alarms"]
    told = client.post(f"/admin/alarms/{episode['id']}/ack", json={})
    assert told.json()["state"] == "acknowledged"
    wait_until(
        lambda: all(
            alarm["acknowledged_row"] is not None
            for alarm in report_of(client, "shifted")["report"]["alarms"]
            if alarm["level"] == "page"
        ),
        "the monitor knows that it was seen",
    )
    alarms = {"input:amount": alarms["input:amount"], "output:twice": alarms["output:twice"]}
    channels = {c["name"]: c for c in second["report"]["channels"]}
    for name in alarms:
        psi = channels[name]["scores"]["psi"]
        assert 0.7 < psi["value"] < 1.2
        assert psi["line"] < 0.25
        # The largest distance of two normal distribution functions, one apart: 2 Phi(1/2) - 1.
        ks = channels[name]["scores"]["kolmogorov_smirnov"]["value"]
        assert abs(ks - math.erf(0.5 / math.sqrt(2))) < 0.08
    for name in ("input:count", "input:place"):
        assert channels[name]["scores"]["psi"]["value"] < 0.25


def test_unshifted_rows_raise_no_alarm(client: httpx.Client) -> None:
    """Ten windows of the reference's own distribution: no alarm, and scores about their line."""
    send(client, "steady", draw_rows(10 * WINDOW, seed=3))
    found = report_of(client, "steady")

    assert found["report"]["alarms"] == []
    for channel in found["report"]["channels"]:
        assert channel["scores"]["psi"]["value"] < 0.1


def test_a_report_counts_exactly_what_was_sent(client: httpx.Client) -> None:
    """Shares of the categories are those of the rows sent, and an hour holds them all."""
    rows = draw_rows(WINDOW - 120, seed=4)
    rows["place"][:30] = "elsewhere"
    send(client, "exact", rows, at_once=31)
    last = channels_of(client, "exact", window="last")["input:place"]
    hour = report_of(client, "exact", window="1h")["report"]
    total = channels_of(client, "exact", window="total")["input:place"]

    for channel, part in ((last, rows["place"]), (total, rows["place"])):
        seen = Counter(part.tolist())
        shares = dict(zip(channel["bins"], channel["current"], strict=True))
        for level in LEVELS:
            assert shares[level] == pytest.approx(seen[level] / len(part), abs=1e-12)
        assert shares["unseen"] == pytest.approx(30 / len(part), abs=1e-12)
        assert channel["scores"]["unseen_rate"]["value"] == pytest.approx(30 / len(part))
    assert (hour["n_rows"], hour["is_partial"]) == (WINDOW - 120, True)


def test_scores_agree_with_their_own_histograms(client: httpx.Client) -> None:
    """Index, Hellinger and l-infinity, worked out again from the bins that the report shows."""
    send(client, "exact", draw_rows(WINDOW, seed=5, shift=0.4))
    for channel in channels_of(client, "exact", window="last").values():
        r, c = np.array(channel["reference"]), np.array(channel["current"])
        scores = {name: score["value"] for name, score in channel["scores"].items()}
        assert r.sum() == pytest.approx(1)
        assert c.sum() == pytest.approx(1)
        assert scores["l_infinity"] == pytest.approx(np.abs(r - c).max())
        assert scores["hellinger"] == pytest.approx(
            math.sqrt(max(0.0, 1 - float(np.sqrt(r * c).sum()))), abs=1e-9
        )
        both = (r > 0) & (c > 0)
        lower = float(
            ((c - r) * np.log(c / np.where(r > 0, r, 1), where=both, out=c * 0))[both].sum()
        )
        assert scores["psi"] >= lower - 1e-9


def test_missing_values_are_counted_as_missing(client: httpx.Client) -> None:
    """A quarter of the amounts is NaN: the missing rate is exactly that, and far above its line."""
    rows = draw_rows(WINDOW, seed=6)
    rows["amount"][::4] = np.nan
    send(client, "missing", rows)
    score = channels_of(client, "missing")["input:amount"]["scores"]["missing_rate"]

    assert score["value"] == pytest.approx(0.25)
    assert score["is_above"]


def test_each_version_is_judged_by_itself(client: httpx.Client) -> None:
    """Calls by number go to that version's monitor only."""
    send(client, "named", draw_rows(100, seed=8))
    send(client, "named/versions/1", draw_rows(150, seed=9))

    assert report_of(client, "named")["version"] == 2
    assert report_of(client, "named", version="2")["rows_observed"] == 100
    assert report_of(client, "named", version="1")["rows_observed"] == 150


def test_failed_requests_are_not_observed(client: httpx.Client) -> None:
    """Only answered rows are monitored."""
    before = report_of(client, "exact")["rows_observed"]
    bad = request(tensor("amount", "FP32", [1], [1]))
    for _ in range(10):
        assert client.post("/v2/models/exact/infer", json=bad).status_code == 400

    assert report_of(client, "exact")["rows_observed"] == before


def test_the_command_shows_the_same_report(server: Server, client: httpx.Client) -> None:
    """`driftgate drift`: all models, a table for one, or the server's own JSON."""
    everything = driftgate("drift", "--server", server.url)
    table = driftgate("drift", "partly", "--server", server.url)
    as_json = driftgate("drift", "partly", "--server", server.url, "--json")
    unknown = driftgate("drift", "partyl", "--server", server.url)

    assert everything.returncode == table.returncode == as_json.returncode == 0
    assert "shifted" in everything.stdout
    assert "input:count" in table.stdout
    told = json.loads(as_json.stdout)
    told.pop("performance", None)  # Only the command asks for both.
    assert told == report_of(client, "partly")
    assert unknown.returncode != 0
    assert "'partly'" in unknown.stderr


@pytest.mark.parametrize(
    "words",
    [
        ["steady?window=total"],
        ["../admin/models"],
        ["steady/../partly"],
        ["steady", "--version", "0"],
        ["steady", "--version", "-1"],
        ["adopt", "steady/../partly"],
        ["adopt", "steady", "--version", "0", "--rows", "100"],
    ],
)
def test_the_command_asks_for_what_was_typed_and_nothing_else(
    server: Server, client: httpx.Client, words: list[str]
) -> None:
    """A name that is no model's is not found: it never becomes another path or query."""
    ended = driftgate("drift", *words, "--server", server.url)

    assert ended.returncode != 0, ended.stdout
    assert len(ended.stderr.splitlines()) == 1
    assert "adopting" not in report_of(client, "steady")
    assert "adopting" not in report_of(client, "partly")


# -- references that do not fit


def test_a_profile_that_fits_in_part_says_which_columns_do_not(client: httpx.Client) -> None:
    """A wrong type and a strange name are problems by name; the rest is watched."""
    send(client, "partly", draw_rows(60, seed=10))
    found = report_of(client, "partly", window="total")
    problems = " | ".join(found["problems"])

    assert [c["name"] for c in found["report"]["channels"]] == ["input:count"]
    assert found["report"]["n_rows"] == 60
    assert "'input:amount'" in problems
    assert "'input:colour'" in problems
    assert "'input:place'" in problems


@pytest.mark.parametrize("name", list(BROKEN))
def test_a_broken_profile_is_said_and_the_model_serves(
    server: Server, client: httpx.Client, name: str
) -> None:
    """Its reason is in the log and in the answer to whoever asks for drift."""
    got = client.post(f"/v2/models/{name}/infer", json=request(tensor("x", "FP32", [1], [1])))
    found = client.get(f"/drift/{name}").json()
    logged = [e for e in server.events("reference_problem") if e["model"] == name]

    assert got.status_code == 200
    assert len(logged) == 1
    assert found["report"] is None
    assert "reference.json" in " ".join([*found["problems"], found["message"]])
    assert logged[0]["reason"] in [*found["problems"], found["message"]]
    assert str(Path.cwd()) not in json.dumps(found)


def test_a_profile_of_another_model_says_so(client: httpx.Client) -> None:
    """No column fits: the answer names the column that was looked for in vain."""
    found = client.get("/drift/foreign").json()

    assert found["report"] is None
    assert "'input:z'" in " ".join([*found["problems"], found["message"]])


# -- adopting a reference


def test_without_a_reference_the_answer_says_how_to_get_one(client: httpx.Client) -> None:
    """No reference is no error: two ways out are offered."""
    found = client.get("/drift/without").json()

    assert found["report"] is None
    assert found["reference"] is None
    assert "no reference" in found["message"]
    assert "driftgate drift adopt without" in found["message"]


def test_a_reference_is_adopted_from_served_rows_and_outlives_a_restart(tmp_path: Path) -> None:
    """Adopt, serve, see a shift against the adopted rows; after a restart they are in force."""
    models.put(tmp_path, "m", 1, models.mixed())
    settings = {"monitor.window_rows": WINDOW}
    with serve(tmp_path, settings) as server, server.client() as client:
        send(client, "m", draw_rows(200, seed=11))  # before anybody asked: not in the profile
        asked = driftgate("drift", "adopt", "m", "--rows", "1000", "--server", server.url)
        assert asked.returncode == 0, asked.stderr
        assert report_of(client, "m")["adopting"] == {"rows": 0, "of": 1000}
        send(client, "m", draw_rows(1000, seed=12))
        adopted = report_of(client, "m", window="total")
        send(client, "m", draw_rows(2 * WINDOW, seed=13, shift=1.5))
        shifted = report_of(client, "m")
    with serve(tmp_path, settings) as server, server.client() as client:
        send(client, "m", draw_rows(WINDOW, seed=14))
        again = report_of(client, "m")

    assert adopted["reference"]["rows"] == 1000
    assert adopted["report"]["n_rows"] == 0
    assert {"input:amount", "output:twice"} <= {a["channel"] for a in shifted["report"]["alarms"]}
    assert again["reference"]["digest"] == adopted["reference"]["digest"]
    # Conclusions outlive the restart, too: what was raised is still open, or was seen to end.
    assert (
        again["report"]["since"] == shifted["report"]["since"]
        or again["report"]["n_rows"] >= WINDOW
    )


def test_a_registry_that_cannot_be_written_still_lets_adopt(tmp_path: Path) -> None:
    """The profile is in force although nothing could be kept, and the log says that it was not."""
    models.put(tmp_path / "registry", "m", 1, models.identity())
    (tmp_path / "state").write_text("a file where a directory should be")
    flags = ("--port", "0", "--state-dir", str(tmp_path / "state"), "--adopt-rows", "100")
    with serve(tmp_path / "registry", flags=flags) as server, server.client() as client:
        values = list(range(150))
        client.post("/v2/models/m/infer", json=request(tensor("x", "FP32", [150], values)))
        found = wait_until(lambda: report_of(client, "m")["reference"], "it was adopted")
        (event,) = server.events("reference_adopted")

    assert found["rows"] == 100
    assert event["is_kept"] is False


ADOPTABLE: dict[str, list[Any]] = {
    **{kind: [0, 1, 2, 3, 4] for kind in models.ELEMENTS},
    "BOOL": [True, False],
    "BYTES": ["a", "", "\x00", "ü", "x" * 1000],
    "UINT64": [0, 2**64 - 1, 2**63],
    "INT64": [-(2**63), 2**63 - 1, 0],
    "FP16": [65504, -65504, 0.1, float("nan")],
    "FP32": [float("nan")],
    "FP64": [float("inf"), float("-inf"), 1e308, -1e308, 5e-324],
}


@pytest.mark.parametrize("kind", list(models.ELEMENTS))
def test_served_rows_of_every_datatype_can_be_adopted(client: httpx.Client, kind: str) -> None:
    """Also at the limits of the type, or when every value is missing: 100 rows make a profile."""
    assert client.post(f"/admin/models/adopt-{kind}/reference", json={"rows": 100}).is_success
    values = (ADOPTABLE[kind] * 200)[:200]
    for start in (0, 100):
        body = request(tensor("x", kind, [100], values[start : start + 100]))
        got = client.post(f"/v2/models/adopt-{kind}/infer", content=json.dumps(body))
        assert got.status_code == 200, got.text
    found = report_of(client, f"adopt-{kind}", window="total")

    assert found["reference"] is not None, found["message"]
    assert found["reference"]["rows"] == 100
    # What follows in the same block may count already; no row counts twice.
    assert found["report"]["n_rows"] in (0, 100)
    assert {c["name"] for c in found["report"]["channels"]} == {"input:x", "output:y"}


def test_a_model_with_nothing_to_watch_does_not_pretend_to_adopt(client: httpx.Client) -> None:
    """Its tensors are neither columns nor matrices: adopting would collect rows for ever."""
    got = client.post("/admin/models/pictures/reference", json={"rows": 100})

    assert got.status_code == 400, got.text
    assert "'x'" in " ".join(client.get("/drift/pictures").json()["problems"])


# -- metrics


def test_metrics_count_every_request_and_row_exactly(client: httpx.Client) -> None:
    """Two formats read by another program: answered, refused by code, and rows observed."""
    send(client, "counted", draw_rows(130, seed=15), at_once=10)
    for body in ("nonsense", json.dumps({}), json.dumps(request(tensor("x", "FP32", [1], [1])))):
        client.post("/v2/models/counted/infer", content=body)
    send(client, "counted/versions/2", draw_rows(7, seed=16), at_once=7)
    wait_until(lambda: report_of(client, "counted")["rows_observed"] == 137, "all are observed")
    samples = samples_of(client)
    requests = {
        # code, model, traffic, variant, version: in the order of the names
        key[1:]: value
        for key, value in samples.items()
        if key[0] == "driftgate_requests_total" and "counted" in key and value
    }

    assert requests == {
        ("ok", "counted", "primary", "champion", "2"): 13,
        ("bad_request", "counted", "primary", "champion", "2"): 2,
        ("bad_tensor", "counted", "primary", "champion", "2"): 1,
        ("ok", "counted", "pinned", "2", "2"): 1,
    }
    assert samples["driftgate_observed_rows_total", "counted", "2"] == 137
    assert samples["driftgate_tap_dropped_rows_total", "counted", "2"] == 0
    assert samples["driftgate_batch_rows_sum", "counted", "2"] == 137
    assert samples["driftgate_request_seconds_count", "counted", "primary", "champion", "2"] == 13
    assert samples["driftgate_queue_seconds_count", "counted", "2"] == 14
    assert samples["driftgate_queued_rows", "counted", "2"] == 0
    assert samples[("driftgate_ready",)] == 1


def test_histograms_grow_from_bound_to_bound_and_end_in_their_count(client: httpx.Client) -> None:
    """Prometheus reads them cumulated: no bucket is below the one before."""
    for family in text_string_to_metric_families(client.get("/metrics").text):
        if family.type != "histogram":
            continue
        seen: dict[tuple[Any, ...], list[float]] = {}
        counts: dict[tuple[Any, ...], float] = {}
        for sample in family.samples:
            labels = tuple(sorted((k, v) for k, v in sample.labels.items() if k != "le"))
            if sample.name.endswith("_bucket"):
                seen.setdefault(labels, []).append(sample.value)
            elif sample.name.endswith("_count"):
                counts[labels] = sample.value
        assert seen, family.name
        for labels, buckets in seen.items():
            assert buckets == sorted(buckets)
            assert buckets[-1] == counts[labels]


def test_every_metric_has_the_prefix_and_a_help_line(client: httpx.Client) -> None:
    """The names are a contract."""
    families = list(text_string_to_metric_families(client.get("/metrics").text))

    assert len(families) > 10
    assert all(family.name.startswith("driftgate_") for family in families)
    assert all(family.documentation for family in families)


def test_bins_add_up_to_the_rows_of_each_channel(client: httpx.Client) -> None:
    """Every row is in exactly one bin of every channel; shares of the reference add up to one."""
    send(client, "missing", draw_rows(77, seed=17))
    observed = report_of(client, "missing")["rows_observed"]
    rows: Counter[str] = Counter()
    shares: Counter[str] = Counter()
    for family in text_string_to_metric_families(client.get("/metrics/bins").text):
        for sample in family.samples:
            if sample.labels["model"] != "missing":
                continue
            which = rows if sample.name == "driftgate_feature_bin_total" else shares
            which[sample.labels["feature"]] += sample.value  # type: ignore[assignment]  # a float

    assert rows == dict.fromkeys(
        ("input:amount", "input:count", "input:place", "output:twice"), observed
    )
    for total in shares.values():
        assert total == pytest.approx(1)


def test_names_that_clients_make_up_add_no_series(client: httpx.Client) -> None:
    """Three thousand unknown models, versions and paths: the metrics are as long as ever."""
    # Each kind once: the codes of errors are a closed set, and a label.
    client.post("/v2/models/made-up/infer", content=b"{}")
    client.post("/v2/models/steady/versions/99/infer", content=b"{}")
    before = set(samples_of(client))
    for k in range(1000):
        client.post(f"/v2/models/made-up-{k}/infer", content=b"{}")
        client.post(f"/v2/models/steady/versions/{k + 100}/infer", content=b"{}")
        client.get(f"/drift/made-up-{k}")
    added = set(samples_of(client)) - before

    assert not added


def test_hostile_values_cannot_break_the_exposition(client: httpx.Client) -> None:
    """Levels with quotes, line breaks and braces become labels: escaped, and read back equal."""
    nasty = ['"', "\\", "\n", "}", '",x="', "\u2028", "\x1b[0m", "ü", '{le="1"} 5', "#"]
    values = (nasty * 20)[:100]
    client.post("/admin/models/adopt-BYTES/reference", json={"rows": 100})
    body = request(tensor("x", "BYTES", [100], values))
    assert client.post("/v2/models/adopt-BYTES/infer", json=body).is_success
    assert report_of(client, "adopt-BYTES")["reference"]["rows"] == 100
    bins = {
        key[1]
        for key in samples_of(client, "/metrics/bins")
        if key[0] == "driftgate_feature_bin_total" and key[3] == "adopt-BYTES"
    }

    channel = channels_of(client, "adopt-BYTES")["input:x"]
    assert bins == set(channel["bins"])
    for level in nasty:
        assert any(level in label or json.dumps(level)[1:-1] in label for label in bins), level


# -- sampling, and a tap that is full


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    registry = tmp_path_factory.mktemp("small")
    directory = models.put(registry, "m", 1, models.identity())
    profile = Profile.fit({"input:x": np.arange(100, dtype=np.float32)})
    (directory / "reference.json").write_text(profile.to_json())
    return registry


def ask(client: httpx.Client, n_requests: int, rows: int) -> None:
    body = json.dumps(request(tensor("x", "FP32", [rows], list(range(rows)))))
    for _ in range(n_requests):
        assert client.post("/v2/models/m/infer", content=body).status_code == 200


def test_a_sample_of_nothing_switches_monitoring_off(small: Path) -> None:
    """monitor.sample = 0: predictions as ever, no row observed."""
    with serve(small, {"monitor.sample": 0}) as server, server.client() as client:
        ask(client, 50, rows=3)
        found = report_of(client, "m")

    assert (found["rows_observed"], found["rows_dropped"]) == (0, 0)


def test_a_sample_of_half_takes_about_half_of_the_requests(small: Path) -> None:
    """Binomial: within five standard errors of n / 2, and whole requests only."""
    n, rows = 1000, 3
    with serve(small, {"monitor.sample": 50}) as server, server.client() as client:
        ask(client, n, rows)
        observed = report_of(client, "m")["rows_observed"]

    assert observed % rows == 0
    assert abs(observed / rows - n / 2) < 5 * math.sqrt(n / 4)


def test_a_full_tap_drops_rows_and_counts_them(small: Path) -> None:
    """Requests larger than the tap are answered and never observed; none is lost uncounted."""
    with serve(small, {"monitor.tap_rows_max": 10}) as server, server.client() as client:
        ask(client, 20, rows=11)
        ask(client, 20, rows=1)
        found = report_of(client, "m")
        samples = samples_of(client)

    assert found["rows_observed"] + found["rows_dropped"] == 20 * 11 + 20
    assert found["rows_dropped"] >= 20 * 11
    assert found["rows_observed"] >= 10
    assert samples["driftgate_tap_dropped_rows_total", "m", "1"] == found["rows_dropped"]
    assert samples["driftgate_observed_rows_total", "m", "1"] == found["rows_observed"]
