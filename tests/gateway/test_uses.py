"""When versions were last used, over workers and restarts."""

import time
from pathlib import Path

from gateway.uses import Uses


def test_uses_of_all_workers_outlive_them_the_newest_first(tmp_path: Path) -> None:
    """A worker that has not called a version forgets nothing that another one said of it."""
    now = time.monotonic()
    one, other = Uses(tmp_path / "uses", "0"), Uses(tmp_path / "uses", "1")
    one.note([(("a", 1), now - 50), (("b", 2), now - 40), (("never", 1), 0.0)], at_once=True)
    other.note([(("a", 1), now - 30), (("c", 3), now - 60)], at_once=True)

    again = Uses(tmp_path / "uses", "0")
    again.start()
    assert again.recent() == [("a", 1), ("b", 2), ("c", 3)]
    again.note([(("c", 3), now)], at_once=True)
    for file in (tmp_path / "uses").glob("1.json"):
        file.unlink()
    last = Uses(tmp_path / "uses", "7")
    last.start()
    assert last.recent() == [("c", 3), ("a", 1), ("b", 2)]


def test_they_are_written_once_a_minute_and_what_is_no_such_file_is_passed_over(
    tmp_path: Path,
) -> None:
    """Cheap, and nothing depends on it."""
    (tmp_path / "9.json").write_text('{"a": ')
    (tmp_path / "8.json").write_text('{"a@x": 1.0, "b@2": 3.0}')
    uses = Uses(tmp_path, "0")
    uses.start()
    assert uses.recent() == [("b", 2)]
    uses.note([(("b", 2), time.monotonic())])
    assert not (tmp_path / "0.json").exists(), "it is not time"
    uses.note([(("b", 2), time.monotonic())], at_once=True)
    before = (tmp_path / "0.json").stat().st_mtime_ns
    uses.note([], at_once=True)
    assert (tmp_path / "0.json").stat().st_mtime_ns == before, "nothing is new"
    Uses(tmp_path / "0.json", "0").note([(("b", 2), 1.0)], at_once=True)
