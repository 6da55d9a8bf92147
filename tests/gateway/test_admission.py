"""An unknown model file is opened by a process that nobody misses."""

import contextlib
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, checker, helper, load_from_string, numpy_helper

from gateway import admission
from gateway.admission import Bounds, child, forkserver, graph
from gateway.errors import VersionRefusedError
from registry import catalog
from registry.catalog import VersionFiles
from registry.manifest import TensorEntry
from tests import models
from tests.serving import wait_until

X = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n"])
Y = helper.make_tensor_value_info("y", TensorProto.FLOAT, None)


def model(*nodes: Any, domains: tuple[str, ...] = (), **constants: Any) -> bytes:
    tensors = [numpy_helper.from_array(array, name) for name, array in constants.items()]
    opsets = [helper.make_opsetid("", 17), *(helper.make_opsetid(name, 1) for name in domains)]
    made = helper.make_graph(list(nodes), "g", [X], [Y], tensors)
    content: bytes = helper.make_model(made, opset_imports=opsets, ir_version=8).SerializeToString()
    return content


def endless() -> bytes:
    """A loop of nearly as many turns as there are numbers."""
    whole = np.array(2**62, np.int64)
    return models.slow(n_rounds=1).replace(
        numpy_helper.from_array(np.array(1, np.int64), "n_rounds").SerializeToString(),
        numpy_helper.from_array(whole, "n_rounds").SerializeToString(),
    )


def bomb() -> bytes:
    """Ten gigabytes from a hundred bytes, when constants are folded."""
    return model(
        helper.make_node("ConstantOfShape", ["size"], ["big"]),
        helper.make_node("ReduceSum", ["big"], ["one"]),
        helper.make_node("Add", ["x", "one"], ["y"]),
        size=np.int64([2_500_000_000]),
    )


def put(root: Path, data: bytes) -> Path:
    return models.put(root, "fraud", 1, data)


def with_weights(location: str) -> bytes:
    made = load_from_string(models.with_lost_weights())
    made.graph.initializer[0].external_data[0].value = location
    content: bytes = made.SerializeToString()
    return content


def test_a_good_model_gets_a_verdict(tmp_path: Path) -> None:
    """Signature, times, memory, and operators to keep an eye on."""
    found = admission.admit(put(tmp_path, models.slow()))

    assert found.signature.inputs == (TensorEntry("x", "FP32", (-1, 1)),)
    assert found.signature.outputs == (TensorEntry("y", "FP32", (-1, 1)),)
    assert found.runtime.opsets == {"": 17, "ai.onnx.ml": 3}
    assert found.flagged == ("Loop",)
    assert 0 < found.load_s < 30
    assert 0 < found.run_s < 30
    assert 4 << 20 < found.rss_bytes < 512 << 20


def test_hostile_models_are_refused_within_their_bounds(tmp_path: Path) -> None:
    """Time and memory of the child end, ours do not: each is a sentence, without a path."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    bounds = Bounds(seconds=2.0)
    for k, (data, reason) in enumerate(
        (
            (endless(), "2 s were over before it answered a row of zeros"),
            (bomb(), "cannot be"),
            (b"", "it is no ONNX file"),
            (b"\x3a", "it is no ONNX file"),
            (models.identity()[:-7], "it is no ONNX file"),
            (models.classifier_with_zipmap(), "zipmap off"),
            (models.with_lost_weights(), "'weights.bin', which is not there"),
            (model(helper.make_node("Nonsense", ["x"], ["y"])), "Nonsense"),
            (
                model(helper.make_node("Own", ["x"], ["y"], domain="evil"), domains=("evil",)),
                "operator 'Own' is of the domain 'evil'",
            ),
        )
    ):
        start = time.monotonic()
        with pytest.raises(VersionRefusedError) as caught:
            admission.admit(put(tmp_path / f"{k}", data), bounds)
        assert reason in str(caught.value)
        assert str(tmp_path) not in str(caught.value)
        assert "\n" not in str(caught.value)
        assert time.monotonic() - start < 8
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200 << 10


class Doomed:
    """Fork servers whose children do something else than look."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self._monkeypatch = monkeypatch

    def let_child(self, code: str) -> None:
        """Children of fork servers started from now on run this: `out` is where they report."""
        lines = f"import os; from gateway.admission import child\ndef _look(out, file):\n {code}\n"
        start = "child._look_at_ours = lambda: None; child._look = _look; child.main()"
        self._monkeypatch.setattr(forkserver, "_CHILD", ("-c", lines + start))


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    """No fork server of another test, and none for another."""
    forkserver.end()
    yield
    forkserver.end()


@pytest.fixture
def doomed(monkeypatch: pytest.MonkeyPatch) -> Doomed:
    return Doomed(monkeypatch)


@pytest.mark.parametrize(
    ("code", "reason"),
    [
        ("os.kill(os.getpid(), 11)", r"died before it was looked at \(SIGSEGV\)"),
        ('os.write(out, b\'{"stage":"open"}\\n\'); os.abort()', r"opened \(SIGABRT\)"),
        ("os.write(out, b'garbage'); os._exit(0)", "ended before it was looked at"),
        ("os.write(out, bytes(1 << 25)); os._exit(0)", "died before it was looked at"),
        ("import time; time.sleep(60)", "2 s were over"),
        ("os.close(out); import time; time.sleep(60)", "2 s were over"),
        ("os.kill(os.getppid(), 9); import time; time.sleep(60)", r"looked at \(SIGKILL\)"),
    ],
)
def test_a_child_that_dies_is_a_refusal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, doomed: Doomed, code: str, reason: str
) -> None:
    """A crash of native code is a reason, not an outage, and the next model is looked at."""
    directory = put(tmp_path, models.identity())
    doomed.let_child(code)

    with pytest.raises(VersionRefusedError, match=reason):
        admission.admit(directory, Bounds(seconds=2.0))

    monkeypatch.undo()
    forkserver.end()
    assert admission.admit(directory).signature.inputs


@pytest.mark.parametrize(
    ("code", "reason"),
    [
        ("import os; os.kill(os.getpid(), 11)", r"died before it was looked at \(SIGSEGV\)"),
        ("raise SystemExit('no module')", "ended before it was looked at"),
        ("import time; time.sleep(60)", "2 s were over"),
    ],
)
def test_a_fork_server_that_does_not_start_is_a_refusal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: str, reason: str
) -> None:
    """Within the same time."""
    monkeypatch.setattr(forkserver, "_CHILD", ("-c", code))

    with pytest.raises(VersionRefusedError, match=reason):
        admission.admit(put(tmp_path, models.identity()), Bounds(seconds=2.0))


def test_the_child_is_told_no_secret(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, doomed: Doomed
) -> None:
    """Keys may be in the environment of a server."""
    monkeypatch.setenv("DRIFTGATE_KEYS", "secret")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    doomed.let_child(
        "text = ' '.join(k for k, v in os.environ.items() if v == 'secret')\n"
        " os.write(out, b'{\"refused\": \"told: [' + text.encode() + b']\"}'); os._exit(0)"
    )

    with pytest.raises(VersionRefusedError, match=r"told: \[\]"):
        admission.admit(put(tmp_path, models.identity()))


def fork_servers() -> list[int]:
    """Processes of this one that fork children, children among them not counted."""
    found = []
    for entry in Path("/proc").iterdir():
        with contextlib.suppress(OSError, IndexError):
            words = (entry / "cmdline").read_bytes()
            parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
            if b"gateway.admission.child" in words and parent == os.getpid():
                found.append(int(entry.name))
    return found


def test_several_looks_share_one_fork_server(tmp_path: Path) -> None:
    """It has one thread, is found again, and replaced when something has killed it."""
    directory = put(tmp_path, models.identity())
    for _ in range(3):
        admission.admit(directory)
    (server,) = fork_servers()
    assert len(list(Path(f"/proc/{server}/task").iterdir())) == 1

    os.kill(server, signal.SIGKILL)
    wait_until(lambda: "Z" in Path(f"/proc/{server}/stat").read_text(), "it is gone")
    assert admission.admit(directory).signature.inputs
    assert len(fork_servers()) == 1
    assert fork_servers() != [server]


def test_a_path_is_meant_from_where_it_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between two looks the directory of the process may have become another one."""
    for name in ("here", "there"):
        put(tmp_path / name, models.identity())
        monkeypatch.chdir(tmp_path / name)
        assert admission.admit(Path("fraud/1")).signature.inputs
    (server,) = fork_servers()
    assert Path(f"/proc/{server}/cwd").samefile(tmp_path / "here")


def test_looks_at_once_do_not_wait_for_each_other(tmp_path: Path) -> None:
    """A model that takes its time keeps nobody else; afterwards one fork server stays."""
    slow = put(tmp_path / "slow", endless())
    with ThreadPoolExecutor(4) as pool:
        late = pool.submit(admission.admit, slow, Bounds(seconds=8.0))
        quick = [
            pool.submit(admission.admit, put(tmp_path / f"{k}", models.constant(k)))
            for k in range(3)
        ]
        for each in quick:
            assert each.result(8).signature.outputs
        assert not late.done()
        with pytest.raises(VersionRefusedError, match="8 s were over"):
            late.result(20)
    assert len(fork_servers()) == 1


def test_a_fork_server_nobody_asks_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its memory is given back."""
    monkeypatch.setattr(forkserver, "IDLE_S", 0.2)
    directory = put(tmp_path, models.identity())
    admission.admit(directory)

    wait_until(lambda: not fork_servers(), "it has ended")
    assert admission.admit(directory).signature.inputs


@pytest.mark.parametrize("way", ["", "os._exit(0)", "os.kill(os.getpid(), 9)", "fork()"])
def test_a_fork_server_ends_with_its_process(tmp_path: Path, way: str) -> None:
    """However that ends; a process that it had forked does not keep it, nor share it."""
    code = (
        """
import os, sys, time
from pathlib import Path
from gateway import admission
from gateway.admission import forkserver

def fork():
    if not os.fork():
        assert admission.admit(Path(sys.argv[1])).signature.inputs
        print(own(), flush=True)
        time.sleep(60)
    os.wait()

def own():
    return forkserver._kept._waiting._process.pid

admission.admit(Path(sys.argv[1]))
print(own(), flush=True)
"""
        + way
    )
    directory = put(tmp_path, models.identity())
    with subprocess.Popen(
        [sys.executable, "-c", code, str(directory)], stdout=subprocess.PIPE, start_new_session=True
    ) as process:
        assert process.stdout is not None
        server = int(process.stdout.readline())
        other = int(process.stdout.readline()) if way == "fork()" else 0
        assert server != other
        if other:
            process.kill()
        wait_until(lambda: not Path(f"/proc/{server}").exists(), "it has ended")
        if other:
            assert Path(f"/proc/{other}").exists()
            os.killpg(process.pid, signal.SIGKILL)
            wait_until(lambda: not Path(f"/proc/{other}").exists(), "the other has ended")


def test_ours_is_an_onnx_file() -> None:
    """What a fork server opens before any other, held against the checker."""
    made = load_from_string(child._IDENTITY)
    checker.check_model(made, full_check=True)
    assert [node.op_type for node in made.graph.node] == ["Identity"]


def links(directory: Path) -> Iterator[str]:
    """Names of files of weights that are, each in its way, a file from elsewhere."""
    secret = directory.parent / "secret"
    secret.write_bytes(np.float32([1, 2]).tobytes())
    os.link(secret, directory / "hard")
    yield "hard"
    (directory / "soft").symlink_to(secret)
    yield "soft"
    (directory / "inside").mkdir()
    (directory / "inside" / "weights").write_bytes(secret.read_bytes())
    yield "inside/weights"
    yield "inside/../../secret"
    yield "../secret"
    yield str(secret)[:120]
    yield "."
    yield ""
    yield "inside"


def test_weights_come_from_the_directory_itself_or_not_at_all(tmp_path: Path) -> None:
    """Not by either kind of link, not by a path; onnxruntime alone would follow a hard link."""
    directory = put(tmp_path, b"")
    for name in links(directory):
        (directory / "model.onnx").write_bytes(with_weights(name))
        with pytest.raises(VersionRefusedError, match="cannot be opened"):
            admission.admit(directory)
    (directory / "hard").unlink()
    (directory / "plain").write_bytes(np.float32([1, 2]).tobytes())
    (directory / "model.onnx").write_bytes(with_weights("plain"))

    assert admission.admit(directory).signature.outputs[0].name == "y"
    assert admission.external_files(directory / "model.onnx") == ["plain"]


def test_a_model_that_is_itself_a_link_is_refused(tmp_path: Path) -> None:
    """The rule is the same for every file."""
    put(tmp_path / "a", models.identity())
    directory = tmp_path / "b"
    directory.mkdir()
    (directory / "model.onnx").symlink_to(tmp_path / "a" / "fraud" / "1" / "model.onnx")

    with pytest.raises(VersionRefusedError, match="symbolic link"):
        admission.admit(directory)


@pytest.mark.parametrize(
    "data", [models.slow(), models.mixed(), models.with_lost_weights(), models.lookup()]
)
def test_the_walk_finds_what_the_onnx_package_finds(tmp_path: Path, data: bytes) -> None:
    """Operators (bodies of loops too), opsets and files of weights."""
    file = tmp_path / "model.onnx"
    file.write_bytes(data)
    told = load_from_string(data)
    nodes = list(told.graph.node)
    for node in nodes:
        nodes += [inner for attribute in node.attribute for inner in attribute.g.node]

    found = graph.read(file)

    assert found.operators == {(node.domain, node.op_type) for node in nodes}
    assert found.n_nodes == len(nodes)
    assert found.opsets == {entry.domain: entry.version for entry in told.opset_import}
    assert found.external == {
        entry.value
        for tensor in told.graph.initializer
        for entry in tensor.external_data
        if entry.key == "location"
    }


def test_operators_that_the_model_defines_itself_are_known() -> None:
    """Exporters put them under domains of their own."""
    found = graph.Graph(operators={("pkg.torch", "Gelu")}, functions={("pkg.torch", "Gelu")})
    found.check()
    found.functions.clear()

    with pytest.raises(VersionRefusedError, match=r"pkg\.torch"):
        found.check()


def test_graphs_nested_too_deep_and_too_many_nodes_are_refused(tmp_path: Path) -> None:
    """The walk has bounds of its own."""
    body = helper.make_graph([], "g", [], [])
    for _ in range(graph.DEPTH_MAX + 1):
        body = helper.make_graph(
            [helper.make_node("If", ["x"], ["y"], then_branch=body)], "g", [], []
        )
    file = tmp_path / "model.onnx"
    file.write_bytes(helper.make_model(body).SerializeToString())
    with pytest.raises(VersionRefusedError, match="32 deep"):
        graph.read(file)
    node = helper.make_node("Identity", ["x"], ["y"])
    many = helper.make_graph([node] * (graph.NODES_MAX + 1), "g", [], [])
    file.write_bytes(helper.make_model(many).SerializeToString())
    with pytest.raises(VersionRefusedError, match="100000 nodes"):
        graph.read(file)


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_damage_is_a_refusal_or_another_graph(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    """Whatever the bytes: no other error, no endless walk."""
    good = bytearray(models.slow()[-700:] if data.draw(st.booleans()) else models.mixed())
    for _ in range(data.draw(st.integers(1, 4))):
        good[data.draw(st.integers(0, len(good) - 1))] = data.draw(st.integers(0, 255))
    file = tmp_path_factory.getbasetemp() / "damaged.onnx"
    file.write_bytes(good)

    with contextlib.suppress(VersionRefusedError):
        graph.read(file)


def test_a_verdict_speaks_of_the_files_that_are_opened(tmp_path: Path) -> None:
    """Another profile beside the model does not make it unknown; another byte of it does."""
    directory = put(tmp_path, models.identity())
    files = VersionFiles("fraud", 1, directory)
    first = admission.model_digest(catalog.digests_of(files))
    (directory / "reference.json").write_text("{}")
    assert admission.model_digest(catalog.digests_of(files)) == first
    (directory / "model.onnx").write_bytes(models.constant(1))

    assert admission.model_digest(catalog.digests_of(files)) != first
