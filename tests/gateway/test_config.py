"""Settings: four sources, one order, and every problem said at once."""

from pathlib import Path

import pytest

from gateway import config
from gateway.errors import ConfigError


def test_flag_over_environment_over_file_over_default(tmp_path: Path) -> None:
    """The same setting from each source; the nearest to the person wins."""
    file = tmp_path / "driftgate.yaml"
    file.write_text("batch: {rows_max: 3, wait_s_max: 0.5}\nmonitor: {sample: 7}\nport: 1\n")
    environ = {"DRIFTGATE_BATCH_ROWS_MAX": "4", "DRIFTGATE_PORT": "2", "UNRELATED": "x"}

    made = config.load({"port": 9, "host": None}, file=file, environ=environ)

    assert (made.port, made.batch.rows_max, made.batch.wait_s_max) == (9, 4, 0.5)
    assert made.monitor.sample == 7
    assert made.host == "127.0.0.1"


def test_every_problem_is_said_with_its_source(tmp_path: Path) -> None:
    """Not just the first: unknown keys with the nearest, wrong types, values out of range."""
    file = tmp_path / "driftgate.yaml"
    file.write_text(
        "bacth: {rows_max: 3}\nbatch: {rows_maxx: 1}\nlimits: {timeout_s: -1}\n"
        "monitor: {sample: 101, window_rows: 1, adopt_rows: 3}\n"
    )

    with pytest.raises(ConfigError) as wrong:
        config.load({}, file=file, environ={"DRIFTGATE_PORT": "many"})

    said = "\n".join(wrong.value.problems)
    assert len(wrong.value.problems) == 7
    assert "bacth" in said
    assert "did you mean batch.rows_max?" in said
    assert "limits.timeout_s = -1.0: must be from 0.001 to 3600" in said
    assert "port = 'many' (DRIFTGATE_PORT)" in said
    assert "monitor.sample = 101.0: must be from 0 to 100" in said
    assert "monitor.adopt_rows = 3: must be from 100" in said


@pytest.mark.parametrize("text", ["- 1\n", "a: [\n", "\x00", "batch: 3\n"])
def test_a_file_that_is_no_mapping_of_settings_is_refused(tmp_path: Path, text: str) -> None:
    """With the file's name, never a trace."""
    file = tmp_path / "driftgate.yaml"
    file.write_text(text)

    with pytest.raises(ConfigError, match=r"driftgate\.yaml"):
        config.load({}, file=file, environ={})


def test_an_empty_file_changes_nothing(tmp_path: Path) -> None:
    """A file of comments is a file of defaults."""
    file = tmp_path / "driftgate.yaml"
    file.write_text("# nothing yet\n")

    assert config.load({}, file=file, environ={}) == config.ServerConfig()


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.0.2.7", "example.org"])
def test_beyond_loopback_nothing_starts_without_a_word(host: str) -> None:
    """No key protects the server yet, so being reachable must be asked for."""
    with pytest.raises(ConfigError, match="--insecure"):
        config.load({"host": host}, environ={})

    assert not config.load({"host": host, "insecure": True}, environ={}).is_local


@pytest.mark.parametrize("host", ["127.0.0.1", "127.8.8.8", "::1", "localhost"])
def test_loopback_is_open(host: str) -> None:
    """Only this machine can reach it."""
    assert config.load({"host": host}, environ={}).is_local


def test_settings_are_declared_once_with_unique_names() -> None:
    """Keys and variables derive from the tree and never collide."""
    found = list(config.settings())

    assert len({setting.key for setting in found}) == len(found)
    assert len({setting.variable for setting in found}) == len(found)
    assert {setting.key for setting in found} >= {"batch.rows_max", "limits.timeout_s", "port"}
