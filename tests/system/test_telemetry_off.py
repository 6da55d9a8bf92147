"""onnxruntime's own telemetry is off: nothing is kept, nothing is started, nothing is sent."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests import models
from tests.serving import environment

# What the process tells about itself at its end: its threads, and its sockets.
_TELL = """
import json, os, time
from pathlib import Path
time.sleep(1.5)  # the reporting thread of onnxruntime gets a chance to begin
threads = sorted(p.joinpath("comm").read_text().strip() for p in Path("/proc/self/task").iterdir())
links = []
for entry in Path("/proc/self/fd").iterdir():
    try:
        links.append(os.readlink(entry))
    except OSError:
        pass
print(json.dumps({"threads": threads, "sockets": [l for l in links if l.startswith("socket:")]}))
"""
_SESSION = """
options = onnxruntime.SessionOptions()
options.intra_op_num_threads = 1
session = onnxruntime.InferenceSession(MODEL, options, providers=["CPUExecutionProvider"])
session.run(None, {"x": numpy.zeros(1, numpy.float32)})
"""
_OURS = """
import numpy
from pathlib import Path
from gateway.config import RuntimeConfig
from gateway.runtime import Session
session = Session(Path(MODEL), RuntimeConfig())
session.run([numpy.zeros(1, numpy.float32)])
"""
_BARE = "import numpy, onnxruntime" + _SESSION


def run(code: str, home: Path, **variables: str) -> tuple[dict[str, list[str]], list[str]]:
    """What the process told, and the files that it left at home, where nobody calls it CI."""
    home.mkdir()
    model = home.parent / "model.onnx"
    model.write_bytes(models.identity())
    hidden = ("CI", "GITHUB_ACTIONS", "ORT_DISABLE_TELEMETRY")
    environ = {n: v for n, v in environment().items() if n not in hidden and "XDG" not in n}
    environ |= {"HOME": str(home), "TMPDIR": str(home), **variables}
    # One after another: a session is opened, then the process looks at itself.
    ended = subprocess.run(
        [sys.executable, "-c", f"MODEL = {str(model)!r}\n{code}\n{_TELL}"],
        env=environ,
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    told: dict[str, list[str]] = json.loads(ended.stdout.splitlines()[-1])
    left = [str(path.relative_to(home)) for path in home.rglob("*") if path.is_file()]
    return told, sorted(left)


def test_driftgate_leaves_nothing_and_starts_nothing(tmp_path: Path) -> None:
    """After a session was opened by us: no file at home, no socket, no thread beyond our own.

    The control is the same work by bare onnxruntime, which does leave traces; where it leaves
    none, this test could not fail, and is skipped.
    """
    bare, left_by_bare = run(_BARE, tmp_path / "bare")
    if not left_by_bare and len(bare["threads"]) == 1:
        pytest.skip("onnxruntime leaves no trace on this platform even with telemetry on")
    ours, left_by_us = run(_OURS, tmp_path / "ours")
    off, left_when_off = run(_BARE, tmp_path / "off", ORT_DISABLE_TELEMETRY="1")

    assert left_by_us == left_when_off == []
    assert ours["sockets"] == off["sockets"] == []
    assert len(off["threads"]) <= len(ours["threads"]) < len(bare["threads"]), (ours, bare)


def test_the_switch_is_set_before_onnxruntime_can_be_imported() -> None:
    """Importing any part of driftgate sets it; whoever set it before is not overruled."""
    code = (
        "import sys, os, {module}; print('onnxruntime' in sys.modules,"
        " os.environ['ORT_DISABLE_TELEMETRY'])"
    )
    for module, before, expected in (
        ("gateway", {}, "False 1"),
        ("gateway.cli", {}, "False 1"),
        ("gateway.runtime", {}, "True 1"),
        ("gateway", {"ORT_DISABLE_TELEMETRY": "0"}, "False 0"),
    ):
        environ = {k: v for k, v in environment().items() if k != "ORT_DISABLE_TELEMETRY"} | before
        ended = subprocess.run(
            [sys.executable, "-c", code.format(module=module)],
            env=environ,
            cwd=Path(__file__).parents[2],
            capture_output=True,
            text=True,
            timeout=60,
            check=True,
        )
        assert ended.stdout.strip() == expected, module
