"""The doctor tries out what driftgate needs, and says what does not work."""

import errno
import os
from pathlib import Path

import pytest

from gateway import doctor
from registry.store import Lease
from tests import models


def examine(root: Path) -> dict[str, str]:
    found = doctor.examine(root, root / ".driftgate", workers=2)
    return {one.what: one.state for one in found}


@pytest.fixture
def registry(tmp_path: Path) -> Path:
    models.put(tmp_path / "models", "fraud", 1, models.identity())
    return tmp_path / "models"


def test_a_healthy_place_is_well_and_left_as_it_was(registry: Path) -> None:
    """Every look is made for the registry and for the state."""
    before = sorted(registry.rglob("*"))

    found = examine(registry)

    assert "failure" not in found.values()
    for what in ("link", "rename", "lock", "clock", "fsync", "space", "file system"):
        assert {f"registry: {what}", f"state: {what}"} <= found.keys()
    assert {"packages", "registry", "memory"} <= found.keys()
    assert sorted(registry.rglob("*")) == before


def test_what_does_not_work_is_said(registry: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No links: a warning, since there is another way; locks that hold nobody off: a failure."""

    def refuse(*_: object) -> None:
        raise OSError(errno.EPERM, "no links here")

    monkeypatch.setattr(os, "link", refuse)
    monkeypatch.setattr(Lease, "acquire", lambda _self, wait=False: wait or True)

    found = examine(registry)

    assert found["registry: link"] == "warning"
    assert found["state: lock"] == "failure"


def test_a_registry_that_is_not_there_is_a_failure(tmp_path: Path) -> None:
    """With nothing else tried."""
    assert examine(tmp_path / "nowhere")["registry"] == "failure"


def test_memory_is_planned_for_all_workers(registry: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Against what is available here."""
    monkeypatch.setattr(doctor, "_available", lambda: 100)

    assert examine(registry)["memory"] == "warning"
