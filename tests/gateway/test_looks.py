"""Who looks at a large registry, and how the others hear of what there is to see."""

import time
from pathlib import Path

import pytest

from gateway import looks
from gateway.looks import Looks
from registry.catalog import Catalog
from tests import models
from tests.serving import wait_until


class Counted(Looks):
    """Counts how often it really looks."""

    def __init__(self, registry: Path, run_dir: Path | None) -> None:
        super().__init__(registry, 0.0, run_dir)
        self.n_looks = 0
        look = self.reader.look

        def counted() -> Catalog:
            self.n_looks += 1
            return look()

        self.reader.look = counted  # type: ignore[method-assign]  # the real one, counted


@pytest.fixture
def always(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every registry is large, and it is always time."""
    monkeypatch.setattr(looks, "_SMALL_S", 0.0)
    monkeypatch.setattr(looks, "_SHARE", 0)


def numbers(found: Catalog) -> list[int]:
    return [files.version for files in found.models.get("m", ())]


@pytest.mark.usefixtures("always")
def test_one_worker_of_a_host_looks_and_the_others_hear_of_it(tmp_path: Path) -> None:
    """The others see what is new at their next look; when the one is gone another takes over."""
    models.put(tmp_path / "registry", "m", 1, models.constant(1))
    one, other = (Counted(tmp_path / "registry", tmp_path) for _ in range(2))
    for each in (one, other):
        assert numbers(each.look()) == [1]
        each.look()
    before = (one.n_looks, other.n_looks)
    for _ in range(10):
        one.look()
        other.look()
    assert (one.n_looks - before[0], other.n_looks - before[1]) == (10, 0)

    models.put(tmp_path / "registry", "m", 2, models.constant(2))
    assert numbers(other.look()) == [1]
    assert numbers(one.look()) == [1, 2]
    assert numbers(other.look()) == [1, 2]

    assert one._lease is not None
    one._lease.release()  # As the end of its process does.
    models.put(tmp_path / "registry", "m", 3, models.constant(3))
    assert numbers(other.look()) == [1, 2, 3]


@pytest.mark.usefixtures("always")
def test_who_is_alone_or_told_nothing_for_long_looks_itself(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever should look may hang: nobody relies on it for ever."""
    models.put(tmp_path / "registry", "m", 1, models.constant(1))
    alone = Counted(tmp_path / "registry", None)
    one, other = (Counted(tmp_path / "registry", tmp_path) for _ in range(2))
    for each in (alone, alone, one, one, other, other):
        each.look()
    n_looks = other.n_looks
    alone.look()
    assert (alone.n_looks, other.look(), other.n_looks) == (3, other.look(), n_looks)
    monkeypatch.setattr(looks, "_ALONE_S", 0.0)
    models.put(tmp_path / "registry", "m", 2, models.constant(2))
    assert numbers(other.look()) == [1, 2]


def test_a_look_that_found_something_or_was_held_up_does_not_put_off_the_next(
    tmp_path: Path,
) -> None:
    """What they took is not taken again; what two looks take that find nothing is."""
    models.put(tmp_path, "m", 1, models.constant(1))
    slow = Counted(tmp_path, None)
    counted, works_s = slow.reader.look, 0.02

    def busy() -> Catalog:
        until = time.thread_time() + works_s
        while time.thread_time() < until:
            pass
        return counted()

    slow.reader.look = busy  # type: ignore[method-assign]  # the real one, after some work
    assert numbers(slow.look()) == [1]
    models.put(tmp_path, "m", 2, models.constant(2))
    assert numbers(slow.look()) == [1, 2]

    works_s = 0.0
    slow.look()
    works_s = 0.02
    wait_until(lambda: slow.look() and slow.n_looks == 4, "it is due again at once")
    wait_until(lambda: slow.look() and slow.n_looks == 5, "the one before was the shorter one")
    for _ in range(10):
        slow.look()
    assert slow.n_looks == 5
