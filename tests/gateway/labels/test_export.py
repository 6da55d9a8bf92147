"""Export without what it needs; with it: tests/services/parquet.py."""

import sys
from pathlib import Path

import pytest

from gateway.errors import BadRequestError
from gateway.labels import export
from gateway.labels.store import Store
from tests.serving import driftgate


def test_without_pyarrow_the_extra_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before anything is read or written."""
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    store = Store(f"sqlite:///{tmp_path / 'l.sqlite3'}")

    with pytest.raises(BadRequestError, match=r"driftgate\[parquet\]"):
        export.write(store, "m", tmp_path / "m.parquet", since=0, until=1)
    store.close()
    assert list(tmp_path.iterdir()) == []


def test_where_nothing_is_kept_that_is_said(tmp_path: Path) -> None:
    """And no database is made by asking for one."""
    ended = driftgate("export", "m", "--to", str(tmp_path / "m.parquet"), "-r", str(tmp_path))

    assert (ended.returncode, "no predictions are kept there" in ended.stderr) == (2, True)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("kinds", "expected"),
    [
        (("int", "float"), "float"), (("bool", "int"), "int"), (("int", "int"), "int"),
        (("bool", "float"), "float"), (("int", "text"), "text"), (("float", "floats"), "text"),
        (("floats", "texts"), "text"),
    ],
)  # fmt: skip
def test_a_column_has_the_kind_that_holds_all_of_it(kinds: tuple[str, str], expected: str) -> None:
    """In either order."""
    assert export._joint(*kinds) == export._joint(*reversed(kinds)) == expected
