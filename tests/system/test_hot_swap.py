"""The registry changes while a server answers: what answers next, and what never fails."""

import errno
import json
import os
import shutil
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import pytest

from gateway import publisher
from registry import workers
from registry.revisions import EMPTY, ModelState, Revision, Revisions
from tests import models
from tests.serving import Server, request, serve, tensor, wait_until

ONE = request(tensor("x", "FP32", [1], [0]))
QUICK = {"sync.poll_s": 0.1}


@dataclass
class Record:
    """What clients at full speed were answered."""

    versions: list[int] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)


@contextmanager
def traffic(server: Server, model: str, n_clients: int = 4) -> Iterator[Record]:
    """Ask without a pause over keep-alive connections; every answer is held against itself."""
    record, is_over = Record(), threading.Event()

    def ask() -> None:
        with server.client() as http:
            while not is_over.is_set():
                try:
                    answer = http.post(f"/v2/models/{model}/infer", json=ONE)
                except httpx.HTTPError as error:
                    record.wrong.append(repr(error))
                    continue
                if answer.status_code != 200:
                    record.wrong.append(answer.text)
                    continue
                said = answer.json()
                computed = int(said["outputs"][0]["data"][0])
                if said["model_version"] != str(computed):
                    record.wrong.append(f"{said['model_version']} says {computed}")
                record.versions.append(computed)

    threads = [threading.Thread(target=ask) for _ in range(n_clients)]
    for thread in threads:
        thread.start()
    try:
        yield record
    finally:
        is_over.set()
        for thread in threads:
            thread.join(30)


def overwrite(registry: Path, version: int, content: bytes) -> None:
    """Other bytes under a number that is there, as a careless copy leaves them."""
    (registry / "counted" / str(version) / "model.onnx").write_bytes(content)


def fill(file: Path) -> None:
    """Write until the disk is full."""
    fd = os.open(file, os.O_WRONLY | os.O_CREAT)
    try:
        while True:
            os.write(fd, b"0" * 4096)
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
    finally:
        os.close(fd)


def answering(server: Server, model: str) -> int | None:
    with server.client() as http:
        answer = http.post(f"/v2/models/{model}/infer", json=ONE)
        return int(answer.json()["model_version"]) if answer.status_code == 200 else None


def put_revision(state_dir: Path, **states: ModelState) -> int:
    """What the command line will do: the next revision, with these models changed."""
    chain = Revisions(state_dir)
    head = chain.head()
    number = chain.free_number
    assert chain.append(
        Revision(
            format=1, number=number, parent=head.number, parent_digest=head.digest, time="",
            actor="test", via="python", models={**(head or EMPTY).models, **states},
        )
    )  # fmt: skip
    return number


def test_a_dozen_swaps_under_load_fail_nobody_and_mix_nothing(tmp_path: Path) -> None:
    """Publish after publish; each version answers soon, and no answer is another version's."""
    models.put(tmp_path, "counted", 1, models.constant(1))
    file = tmp_path.parent / "next.onnx"
    with serve(tmp_path, QUICK) as server:
        with traffic(server, "counted") as record:
            for version in range(2, 14):
                file.write_bytes(models.constant(version))
                published = publisher.publish(tmp_path, "counted", file)
                assert published.version == version
                wait_until(lambda v=version: v in record.versions[-200:], f"{version} answers", 20)
        text = httpx.get(f"{server.url}/metrics", trust_env=False).text
        # Only the version that answers, and the one before it, are still open.
        wait_until(lambda: _n_open(server) <= 2, "the others are closed")
    assert record.wrong == []
    assert set(record.versions) == set(range(1, 14))
    history = Revisions(tmp_path / ".driftgate").history()
    assert history[0].models["counted"].aliases["champion"] == 13
    assert history[0].models["counted"].follow
    assert {revision.actor for revision in history} == {"follow"}
    assert 'driftgate_swaps_total{model="counted"} 12.0' in text


def _n_open(server: Server) -> int:
    text = httpx.get(f"{server.url}/metrics", trust_env=False).text
    return text.count("driftgate_session_bytes{")


def test_a_copy_in_progress_is_never_served(tmp_path: Path) -> None:
    """Slow bytes, a pause longer than the settle time, more bytes: 1 answers until 2 is whole."""
    models.put(tmp_path, "counted", 1, models.constant(1))
    content = models.constant(2)
    with (
        serve(tmp_path, {**QUICK, "sync.settle_s": 0.5}) as server,
        traffic(server, "counted", 1) as record,
    ):
        (tmp_path / "counted" / "2").mkdir()
        with (tmp_path / "counted" / "2" / "model.onnx").open("wb") as file:
            for k in range(0, len(content), max(1, len(content) // 8)):
                file.write(content[k : k + max(1, len(content) // 8)])
                file.flush()
                time.sleep(0.15)  # the copy is slow: that is what is tested
            assert set(record.versions) == {1}
        wait_until(lambda: 2 in record.versions[-50:], "the whole version answers", 20)
    assert record.wrong == []


def test_a_bad_version_is_refused_and_the_old_one_serves_on(tmp_path: Path) -> None:
    """With its reason, once, and tried again when its files have changed."""
    models.put(tmp_path, "counted", 1, models.constant(1))
    with serve(tmp_path, QUICK) as server:
        with traffic(server, "counted", 1) as record:
            models.put(tmp_path, "counted", 2, b"no model at all")
            refusal = server.wait_for("version_refused")
            assert (refusal["model"], refusal["version"]) == ("counted", 2)
            with server.client() as http:
                about = http.get("/admin/models/counted").json()["versions"][1]
                assert (about["state"], about["reason"]) == ("refused", refusal["reason"])
            overwrite(tmp_path, 2, models.constant(2))
            wait_until(lambda: 2 in record.versions[-50:], "the mended version answers", 20)
        assert len(server.events("version_refused")) == 1
    assert record.wrong == []


def test_what_clients_cannot_call_is_not_followed(tmp_path: Path) -> None:
    """Another shape of input: the version answers by its number, and the old one by default."""
    models.put(tmp_path, "matrix", 1, models.identity("FP32", ("n", 3)))
    with serve(tmp_path, QUICK) as server, server.client() as http:
        models.put(tmp_path, "matrix", 2, models.identity("FP32", ("n", 4)))
        held = server.wait_for("version_held")
        assert "FP32 [-1, 4], and was FP32 [-1, 3]" in held["reason"]
        row = request(tensor("x", "FP32", [1, 3], [[1, 2, 3]]))
        assert http.post("/v2/models/matrix/infer", json=row).json()["model_version"] == "1"
        row = request(tensor("x", "FP32", [1, 4], [[1, 2, 3, 4]]))
        by_number = http.post("/v2/models/matrix/versions/2/infer", json=row)
        assert by_number.json()["model_version"] == "2"


def test_a_registry_that_goes_away_takes_nothing_with_it(tmp_path: Path) -> None:
    """Moved away under load: everything answers, the gauge says so, and it heals by itself."""
    registry = tmp_path / "models"
    models.put(registry, "counted", 1, models.constant(1))
    settings = {**QUICK, "state_dir": tmp_path / "state"}
    with serve(registry, settings) as server:

        def degraded() -> bool:
            with server.client() as http:
                return 'driftgate_degraded{what="registry"} 1.0' in http.get("/metrics").text

        with traffic(server, "counted", 2) as record:
            registry.rename(tmp_path / "away")
            wait_until(degraded, "the gauge says that the registry is gone")
            with server.client() as http:
                assert http.get("/v2/health/ready").status_code == 200
            (tmp_path / "away").rename(registry)
            wait_until(lambda: not degraded(), "it is there again")
            shutil.rmtree(registry / "counted")
            models.put(registry, "counted", 2, models.constant(2))
            wait_until(lambda: 2 in record.versions[-50:], "the next version answers", 20)
    assert record.wrong == []


def test_a_revision_decides_who_answers_and_a_restart_finds_it_again(tmp_path: Path) -> None:
    """Aliases over numbers: back to 1 although 3 is there; publishing moves nothing any more."""
    for version in (1, 2, 3):
        models.put(tmp_path, "counted", version, models.constant(version))
    state = tmp_path / ".driftgate"
    with serve(tmp_path, QUICK) as server:
        assert answering(server, "counted") == 3
        with traffic(server, "counted", 2) as record:
            managed = ModelState(follow=False, aliases={"champion": 1, "previous": 3})
            number = put_revision(state, counted=managed)
            assert workers.wait_applied(state, number, 10) == []
            assert answering(server, "counted") == 1
            models.put(tmp_path, "counted", 4, models.constant(4))
            impossible = ModelState(follow=False, aliases={"champion": 9})
            number = put_revision(state, counted=impossible)
            rejected = server.wait_for("revision_rejected")
            assert rejected["revision"] == number
            assert "no version '9'" in rejected["reason"]
            assert [beat.observed for beat in workers.wait_applied(state, number, 5)] == [1]
            assert answering(server, "counted") == 1
            number = put_revision(state, counted=ModelState())
            assert workers.wait_applied(state, number, 10) == []
            wait_until(lambda: answering(server, "counted") == 4, "it follows again")
            number = put_revision(state, counted=managed)
            assert workers.wait_applied(state, number, 10) == []
    assert record.wrong == []
    with serve(tmp_path, QUICK) as server:
        assert answering(server, "counted") == 1


def test_a_withdrawn_version_stops_answering_and_the_next_lower_one_takes_over(
    tmp_path: Path,
) -> None:
    """By number it is gone as well."""
    for version in (1, 2):
        models.put(tmp_path, "counted", version, models.constant(version))
    with serve(tmp_path, QUICK) as server:
        with traffic(server, "counted", 2) as record:
            wait_until(lambda: 2 in record.versions, "2 answers")
            (tmp_path / "counted" / ".withdrawn-2").touch()
            wait_until(lambda: record.versions[-1] == 1, "1 answers")
        with server.client() as http:
            assert http.post("/v2/models/counted/versions/2/infer", json=ONE).status_code == 404
    assert record.wrong == []


def test_changed_bytes_under_a_served_number_are_said_and_not_served(tmp_path: Path) -> None:
    """Immutable once admitted: the new bytes need a number of their own."""
    models.put(tmp_path, "counted", 1, models.constant(1))
    with serve(tmp_path, QUICK) as server:
        with traffic(server, "counted", 1) as record:
            overwrite(tmp_path, 1, models.constant(7))
            degraded = server.wait_for("degraded")
            assert (degraded["what"], degraded["reason"]) == ("changed", "counted 1")
        assert answering(server, "counted") == 1
    assert record.wrong == []
    assert set(record.versions) == {1}


def test_memory_is_a_budget_that_unrouted_versions_leave_first(tmp_path: Path) -> None:
    """Calls by number open versions; the one least recently used goes, the champion never does."""
    for version in range(1, 13):
        models.put(tmp_path, "weights", version, models.slow(n_rounds=1))  # 4 MiB each
    row, budget = request(tensor("x", "FP32", [1, 1], [[1]])), 70 << 20
    settings = {**QUICK, "sync.memory_bytes_max": budget}
    with serve(tmp_path, settings) as server, server.client() as http:
        for version in (*range(1, 12), 1, 2, 3):
            answer = http.post(f"/v2/models/weights/versions/{version}/infer", json=row)
            assert answer.json().get("model_version") == str(version), answer.text
        evicted = [event["version"] for event in server.events("version_evicted")]
        assert evicted
        assert evicted[0] == 1
        assert 12 not in evicted
        sizes = [
            float(line.rsplit(" ", 1)[1])
            for line in http.get("/metrics").text.splitlines()
            if line.startswith("driftgate_session_bytes{")
        ]
        assert 8 << 20 <= sum(sizes) <= budget
        assert http.post("/v2/models/weights/infer", json=row).json()["model_version"] == "12"
    settings["sync.memory_bytes_max"] = 18 << 20
    with serve(tmp_path, settings) as server, server.client() as http:
        answer = http.post("/v2/models/weights/versions/1/infer", json=row)
        assert (answer.status_code, answer.json()["code"]) == (503, "no_memory")
        assert "of 18 MiB are taken" in answer.json()["error"]
        assert http.post("/v2/models/weights/infer", json=row).json()["model_version"] == "12"


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can mount a small file system")
def test_a_full_disk_stops_neither_answers_nor_swaps(tmp_path: Path) -> None:
    """State and run directory without a byte left: version 2 is swapped in all the same."""
    small = tmp_path / "small"
    small.mkdir()
    if os.system(f"mount -t tmpfs -o size=256k tmpfs {small} 2>/dev/null"):
        pytest.skip("mounting is not permitted here")
    try:
        registry = tmp_path / "models"
        models.put(registry, "counted", 1, models.constant(1))
        with (
            serve(registry, {**QUICK, "state_dir": small}) as server,
            traffic(server, "counted", 2) as record,
        ):
            fill(small / "filler")
            server.wait_for("degraded")
            models.put(registry, "counted", 2, models.constant(2))
            wait_until(lambda: 2 in record.versions[-50:], "2 answers", 20)
            (small / "filler").unlink()
            server.wait_for("recovered")
        assert record.wrong == []
    finally:
        os.system(f"umount -l {small}")


def test_thirty_models_at_once_disturb_nobody(tmp_path: Path) -> None:
    """A herd: all are served within a bounded time, and who is served already does not fail."""
    models.put(tmp_path / "models", "counted", 1, models.constant(1))
    for k in range(30):
        models.put(tmp_path / "herd", f"herd-{k}", 1, models.constant(1))
    with serve(tmp_path / "models", QUICK) as server, traffic(server, "counted", 2) as record:
        for k in range(30):
            shutil.move(tmp_path / "herd" / f"herd-{k}", tmp_path / "models" / f"herd-{k}")

        def all_answer() -> bool:
            with server.client() as http:
                index = http.post("/v2/repository/index", json={"ready": True}).json()
                opened = {e["model"] for e in server.events("version_opened")}
                return len(index) == 31 and len(opened) == 31

        wait_until(all_answer, "all thirty are open", 60)
    assert record.wrong == []
    assert len(json.dumps(server.events("sync_failed"))) == 2
