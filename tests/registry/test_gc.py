"""What nothing refers to goes, by way of the trash; whatever may still be wanted stays."""

from pathlib import Path
from typing import Any

import pytest

from registry import catalog, gc, routes
from registry.errors import RegistryError
from registry.revisions import FORMAT, ModelState, Revision, Revisions

DAY_S = 86_400.0


@pytest.fixture
def registry(tmp_path: Path) -> Path:
    """Ten versions of a model, and one of another."""
    root = tmp_path / "models"
    for model, n in (("fraud", 10), ("other", 1)):
        for version in range(1, n + 1):
            directory = root / model / str(version)
            directory.mkdir(parents=True)
            (directory / "model.onnx").write_bytes(b"x" * version)
    return root


def revision(number: int, before: Revision | None = None, **state: Any) -> Revision:
    return Revision(
        format=FORMAT,
        number=number,
        parent=0 if before is None else before.number,
        parent_digest="" if before is None else before.digest,
        time="",
        actor="ana",
        via="cli",
        models={"fraud": ModelState(**state)},
    )


def leaving(registry: Path, *chain: Revision, keep: int = 1, in_days: float = 8.0) -> list[int]:
    now = gc.now_of(registry) + in_days * DAY_S
    plan = gc.plan(catalog.scan(registry), chain, keep=keep, age_s_min=7 * DAY_S, now=now)
    assert {one.files.model for one in plan.leaving} <= {"fraud"}
    return [one.files.version for one in plan.leaving]


def test_what_anything_refers_to_stays(registry: Path) -> None:
    """Alias, pin, route (split, rule, shadow, fallback), rollout, adopted reference; old or new."""
    route = routes.parse(
        {
            "fraud": {
                "split": [{"to": "champion", "weight": "rest"}, {"to": 3, "weight": 5}],
                "shadow": [{"to": 4, "sample": 5}],
                "fallback": {"on": ["error"], "to": [5]},
            }
        }
    )["fraud"]
    old = revision(1, aliases={"champion": 1})
    new = revision(
        2,
        aliases={"champion": 2},
        route=route,
        pins=(6,),
        rollout={"candidate": {"version": 7}},
        reference={"8": "sha256:00"},
    )

    assert leaving(registry, new, old) == [9]
    assert leaving(registry, new) == [1, 9]
    assert leaving(registry) == [1, 2, 3, 4, 5, 6, 7, 8, 9]


def test_the_newest_and_the_young_stay(registry: Path) -> None:
    """The highest in any case: its number must not be given to other files."""
    assert leaving(registry, keep=4) == [1, 2, 3, 4, 5, 6]
    assert leaving(registry, keep=0)[-1] == 9
    assert leaving(registry, in_days=6.9) == []
    assert leaving(registry, in_days=-400) == []


def test_the_trash_gives_back_what_it_has_until_it_is_emptied(registry: Path) -> None:
    """A rename away, a rename back; after its time it is gone."""
    (files,) = (one for one in catalog.scan(registry).models["fraud"] if one.version == 3)
    place = gc.trash(files)
    assert catalog.scan(registry).find("fraud", 3) is None
    assert catalog.scan(registry).problems == ()
    place.rename(files.directory)
    assert catalog.scan(registry).find("fraud", 3) is not None

    gc.trash(files)
    now = gc.now_of(registry)
    assert gc.empty(registry, ["fraud", "other"], age_s_min=DAY_S, now=now) == 0
    assert gc.empty(registry, ["fraud", "other"], age_s_min=DAY_S, now=now + 2 * DAY_S) == 3
    assert list((registry / "fraud" / gc.TRASH).iterdir()) == []


def test_what_is_named_while_it_is_collected_comes_back(registry: Path, tmp_path: Path) -> None:
    """Somebody promotes a version between the look and the move."""
    chain = Revisions(tmp_path / "state")
    now = gc.now_of(registry) + 8 * DAY_S
    plan = gc.plan(catalog.scan(registry), chain.history(), keep=8, age_s_min=0, now=now)
    assert [one.files.version for one in plan.leaving] == [1, 2]
    assert chain.append(revision(1, aliases={"champion": 2}))

    gone = gc.collect(plan, chain)

    assert [one.files.version for one in gone] == [1]
    assert catalog.scan(registry).find("fraud", 2) is not None


def test_a_withdrawn_version_is_so_once_and_keeps_its_files(registry: Path) -> None:
    """And only one that is there can be."""

    def withdraw(model: str, version: int) -> bool:
        return gc.withdraw(registry, model, version, reason="leaks", by="ana", time="")

    assert withdraw("fraud", 3)
    assert not withdraw("fraud", 3)
    for model, version in (("fraud", 11), ("nobody", 1), ("../models", 1)):
        with pytest.raises(RegistryError):
            withdraw(model, version)
    found = catalog.scan(registry)
    assert found.find("fraud", 3) is None
    assert found.withdrawn == {("fraud", 3)}
    assert (registry / "fraud" / "3" / "model.onnx").is_file()
