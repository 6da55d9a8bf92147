"""A model file becomes a version whole or not at all, whoever else publishes and whatever fails."""

import contextlib
import errno
import json
import os
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
)
from onnx import load_from_string

from gateway import admission
from gateway.admission import Admitted
from gateway.errors import (
    BadRequestError,
    GatewayError,
    StorageError,
    VersionRefusedError,
    VersionTakenError,
    VersionWithdrawnError,
)
from gateway.publisher import Published, publish
from monitors import Profile
from registry import catalog, manifest, store, trust
from registry.catalog import VersionFiles
from registry.errors import ManifestError, UntrustedError
from registry.manifest import Runtime, SignatureEntry, TensorEntry
from tests import models
from tests.serving import wait_until


@pytest.fixture
def registry(tmp_path: Path) -> Path:
    root = tmp_path / "models"
    root.mkdir()
    return root


@pytest.fixture
def trusting(monkeypatch: pytest.MonkeyPatch) -> None:
    """The look in the child process is shown elsewhere, and takes a while."""
    tensors = (TensorEntry("x", "FP32", (-1,)),)
    found = Admitted(SignatureEntry(tensors, tensors), Runtime(), 0.1, 0.1, 1, ())
    monkeypatch.setattr(admission, "admit", lambda _: found)


def put(folder: Path, data: bytes, name: str = "trained.onnx") -> Path:
    (folder / name).write_bytes(data)
    return folder / name


def whole(registry: Path, model: str = "fraud") -> dict[int, str]:
    """Digests of the versions that are there, each compared with its own manifest."""
    found: dict[int, str] = {}
    for files in catalog.scan(registry).models.get(model, ()):
        assert files.manifest is not None
        assert catalog.digest_of(files) == files.manifest.digest
        found[files.version] = files.manifest.digest
    return found


def staged(registry: Path) -> list[str]:
    return [path.name for path in (registry / "fraud" / store.STAGING).iterdir()]


def test_a_version_has_everything_that_was_given(tmp_path: Path, registry: Path) -> None:
    """Model, profile fitted by running it, cases, and a manifest about them."""
    rows = np.random.default_rng(7).normal(size=500).astype(np.float32)
    data = tmp_path / "train.csv"
    data.write_text("x\n" + "\n".join(map(str, rows)) + "\n")
    golden = put(tmp_path, b'{"inputs": {"x": [1, 2]}, "outputs": {"y": [5, 5]}}\n', "cases")
    told: list[tuple[str, float]] = []

    made = publish(
        registry,
        "fraud",
        put(tmp_path, models.constant(5)),
        reference=data,
        golden=golden,
        warmup=golden,
        lineage={"data": ["tx-2026"], "own": {"deep": 1}},
        tags={"ticket": "RISK-118"},
        progress=lambda what, share: told.append((what, share)),
    )

    assert (made.version, made.is_new, made.problems) == (1, True, ())
    (files,) = catalog.scan(registry).models["fraud"]
    assert files.manifest is not None
    described = files.manifest
    assert whole(registry) == {1: made.digest}
    assert sorted(described.files) == [
        "golden.jsonl",
        "model.onnx",
        "reference.json",
        "warmup.jsonl",
    ]
    assert described.lineage["own"] == {"deep": 1}
    assert described.tags == {"ticket": "RISK-118"}
    assert described.signature.outputs[0].name == "y"
    assert admission.is_known(described)
    profile = Profile.from_json(files.reference_file.read_bytes())
    assert list(profile.channels) == ["input:x", "output:y"]
    assert profile.n_rows == 500
    assert ("copying", 1.0) in told
    assert not os.access(files.model_file, os.W_OK) or os.getuid() == 0
    assert files.model_file.stat().st_mode & 0o222 == 0
    assert staged(registry) == []


def test_equal_files_are_one_version_and_others_the_next(tmp_path: Path, registry: Path) -> None:
    """By digest, whatever their file is called."""
    first = publish(registry, "fraud", put(tmp_path, models.constant(1), "a.onnx"))
    second = publish(registry, "fraud", put(tmp_path, models.constant(2), "b.onnx"))
    again = publish(registry, "fraud", put(tmp_path, models.constant(1), "c.onnx"))

    assert (first.version, second.version) == (1, 2)
    assert (again.version, again.digest, again.is_new) == (1, first.digest, False)
    assert sorted(whole(registry)) == [1, 2]


@pytest.mark.usefixtures("trusting")
def test_a_directory_copied_by_hand_counts_as_a_version(tmp_path: Path, registry: Path) -> None:
    """Its number is taken, and its files are not published twice."""
    models.put(registry, "fraud", 7, models.constant(1))

    again = publish(registry, "fraud", put(tmp_path, models.constant(1)))
    other = publish(registry, "fraud", put(tmp_path, models.constant(2)))

    assert (again.version, again.is_new) == (7, False)
    assert other.version == 8


@pytest.mark.usefixtures("trusting")
def test_who_names_a_number_that_is_taken_is_told(tmp_path: Path, registry: Path) -> None:
    """Instead of getting another."""
    publish(registry, "fraud", put(tmp_path, models.constant(1)), version=3)

    with pytest.raises(VersionTakenError, match="version 3 already"):
        publish(registry, "fraud", put(tmp_path, models.constant(2)), version=3)
    assert publish(registry, "fraud", put(tmp_path, models.constant(1)), version=3).is_new is False
    assert publish(registry, "fraud", put(tmp_path, models.constant(2))).version == 4


@pytest.mark.usefixtures("trusting")
def test_the_same_files_are_not_published_after_they_were_withdrawn(
    tmp_path: Path, registry: Path
) -> None:
    """Under no number."""
    publish(registry, "fraud", put(tmp_path, models.constant(1)))
    store.create_if_absent(registry / "fraud" / f"{catalog.WITHDRAWN}1", b"{}")

    with pytest.raises(VersionWithdrawnError, match="version 1"):
        publish(registry, "fraud", put(tmp_path, models.constant(1)))


@pytest.mark.parametrize(
    ("lines", "reason"),
    [
        ('{"inputs": {"x": [1]}, "outputs": {"y": [6]}}', r"output 'y': is .*5.* instead of .*6"),
        ('\n{"inputs": {"x": [1]}, "outputs": {"y": [5, 5]}}', r"line 2: output 'y': has shape"),
        ('{"inputs": {"z": [1]}}', "line 1: no values for 'x'"),
        ('{"inputs": {"x": [1], "z": 1}}', "no input 'z'"),
        ('{"inputs": {"x": [1]}, "outputs": {"z": 1}}', "no output 'z'"),
        ('{"inputs": {"x": [[1]]}}', r"'x' has shape \[1, 1\]"),
        ('{"inputs": {"x": ["a"]}}', "line 1: could not convert"),
        ('{"inputs"', "line 1: "),
        ("", "is empty"),
    ],
)
@pytest.mark.usefixtures("trusting")
def test_what_does_not_pass_its_golden_cases_is_not_published(
    tmp_path: Path, registry: Path, lines: str, reason: str
) -> None:
    """The line is named, and nothing is there."""
    golden = put(tmp_path, lines.encode(), "golden.jsonl")

    with pytest.raises((BadRequestError, VersionRefusedError), match=reason):
        publish(registry, "fraud", put(tmp_path, models.constant(5)), golden=golden)

    assert whole(registry) == {}
    assert staged(registry) == []


def test_a_profile_is_held_against_the_signature(tmp_path: Path, registry: Path) -> None:
    """One of which nothing fits is refused; of one that fits in part, the rest is said."""
    rows = np.linspace(0, 1, 100)
    file = put(tmp_path, models.constant(5))

    def profile(*names: str) -> Path:
        made = Profile.fit(dict.fromkeys(names, rows))
        return put(tmp_path, made.to_json().encode(), "made.json")

    with pytest.raises(BadRequestError, match=r"'input:X' is not; did you mean 'input:x'\?"):
        publish(registry, "fraud", file, reference=profile("input:X"))
    made = publish(registry, "fraud", file, reference=profile("input:x", "input:z"))
    assert "'input:z' is no input or output" in made.problems[0]
    assert made.version == 1


@pytest.mark.parametrize(
    ("model", "file", "reason"),
    [
        ("../up", b"", "no name of a model"),
        ("fraud", None, "no such file"),
        ("fraud", b"garbage", "no ONNX file"),
        ("fraud", models.classifier_with_zipmap(), "zipmap"),
        ("fraud", models.with_lost_weights(), "weights.bin"),
    ],
)
def test_what_cannot_be_served_is_not_published(
    tmp_path: Path, registry: Path, model: str, file: bytes | None, reason: str
) -> None:
    """With its reason, without a path."""
    source = tmp_path / "trained.onnx" if file is None else put(tmp_path, file)

    with pytest.raises(GatewayError, match=reason) as caught:
        publish(registry, model, source)

    assert str(tmp_path) not in str(caught.value)
    assert whole(registry) == {}


def test_weights_beside_the_file_come_along(tmp_path: Path, registry: Path) -> None:
    """Those that the file names; as a link they do not."""
    made = load_from_string(models.with_lost_weights())
    source = put(tmp_path, made.SerializeToString())
    secret = put(tmp_path, np.float32([1, 2]).tobytes(), "secret")
    put(tmp_path, b"not named", "other.bin")
    for link in (os.link, os.symlink):
        link(secret, tmp_path / "weights.bin")
        with pytest.raises(BadRequestError, match=r"'weights.bin': (has a second|is a symbolic)"):
            publish(registry, "fraud", source)
        (tmp_path / "weights.bin").unlink()
    put(tmp_path, np.float32([1, 2]).tobytes(), "weights.bin")

    publish(registry, "fraud", source)

    (files,) = catalog.scan(registry).models["fraud"]
    assert catalog.content(files.directory) == ["model.onnx", "weights.bin"]


def keys(tmp_path: Path, name: str) -> tuple[Path, Path]:
    key = Ed25519PrivateKey.generate()
    private, public = tmp_path / f"{name}.key", tmp_path / f"{name}.pub"
    private.write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    private.chmod(0o600)
    public.write_bytes(
        key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
    )
    return private, public


@pytest.mark.usefixtures("trusting")
def test_only_what_a_trusted_key_signed_is_trusted(tmp_path: Path, registry: Path) -> None:
    """Unsigned, signed by another, changed, or moved to another number: each is refused."""
    ours, public = keys(tmp_path, "ours")
    theirs, _ = keys(tmp_path, "theirs")
    trusted = trust.read_keys(public)
    made = publish(registry, "fraud", put(tmp_path, models.constant(1)), sign=ours)
    publish(registry, "fraud", put(tmp_path, models.constant(2)), sign=theirs)
    publish(registry, "fraud", put(tmp_path, models.constant(3)))

    def verify(version: int) -> manifest.Manifest:
        where = registry / "fraud" / str(version)
        return trust.verify(where, trusted, model="fraud", version=version)

    assert verify(1).digest == made.digest
    with pytest.raises(UntrustedError, match="none of the trusted keys"):
        verify(2)
    with pytest.raises(UntrustedError, match=r"no manifest\.sig"):
        verify(3)
    (registry / "fraud" / "1").rename(registry / "fraud" / "4")
    with pytest.raises(ManifestError, match="version 1"):
        verify(4)
    document = registry / "fraud" / "4" / manifest.FILE
    document.chmod(0o644)
    document.write_bytes(document.read_bytes().replace(b'"version": 1', b'"version": 4'))
    with pytest.raises(UntrustedError, match="was changed"):
        verify(4)
    signed = publish(registry, "fraud", put(tmp_path, models.constant(3)), sign=ours)
    assert (signed.version, signed.is_new) == (3, False)
    assert verify(3).digest == signed.digest
    with pytest.raises(BadRequestError, match="none of the trusted keys"):
        publish(registry, "fraud", put(tmp_path, models.constant(2)), sign=ours)


def test_what_somebody_else_says_of_the_same_files_is_not_signed(
    tmp_path: Path, registry: Path
) -> None:
    """A manifest that was put there with just these files, and another signature of tensors."""
    ours, _ = keys(tmp_path, "ours")
    publish(registry, "fraud", put(tmp_path, models.constant(1)))
    document = registry / "fraud" / "1" / manifest.FILE
    document.chmod(0o644)
    document.write_bytes(document.read_bytes().replace(b'"FP32"', b'"FP64"'))

    with pytest.raises(BadRequestError, match="says otherwise"):
        publish(registry, "fraud", put(tmp_path, models.constant(1)), sign=ours)
    assert not (registry / "fraud" / "1" / manifest.SEAL_FILE).exists()


@pytest.mark.usefixtures("trusting")
def test_openssl_makes_the_keys_and_agrees_on_the_signature(tmp_path: Path, registry: Path) -> None:
    """What the page says, with another implementation."""

    def openssl(*words: str) -> int:
        return subprocess.run(
            ["openssl", *words], cwd=tmp_path, check=False, capture_output=True
        ).returncode

    try:
        assert openssl("genpkey", "-algorithm", "ed25519", "-out", "our.key") == 0
    except FileNotFoundError:
        pytest.skip("no openssl on this machine")
    assert openssl("pkey", "-in", "our.key", "-pubout", "-out", "our.pub") == 0
    (tmp_path / "our.key").chmod(0o600)
    publish(registry, "fraud", put(tmp_path, models.constant(1)), sign=tmp_path / "our.key")
    where = registry / "fraud" / "1"
    check = ["pkeyutl", "-verify", "-pubin", "-inkey", "our.pub", "-rawin"]

    assert trust.verify(where, trust.read_keys(tmp_path), model="fraud", version=1).version == 1
    assert (
        openssl(*check, "-in", f"{where}/manifest.json", "-sigfile", f"{where}/manifest.sig") == 0
    )


@pytest.mark.usefixtures("trusting")
def test_two_at_once_each_get_a_number(tmp_path: Path, registry: Path) -> None:
    """Eight publishers of eight files: eight versions; of one file: one version."""
    files = [put(tmp_path, models.constant(k), f"{k}.onnx") for k in range(8)]
    with ThreadPoolExecutor(8) as pool:
        made = list(pool.map(lambda file: publish(registry, "fraud", file), files))
        assert sorted(one.version for one in made) == list(range(1, 9))
        assert whole(registry) == {one.version: one.digest for one in made}
        same = put(tmp_path, models.constant(99), "same.onnx")
        again = list(pool.map(lambda _: publish(registry, "fraud", same), range(8)))

    assert {one.version for one in again} == {9}
    assert [one.is_new for one in again].count(True) == 1
    assert staged(registry) == []


MANY = """
import sys
from pathlib import Path
from gateway import admission
from gateway.admission import Admitted
from gateway.publisher import Published, publish
from registry.manifest import Runtime, SignatureEntry

admission.admit = lambda _: Admitted(SignatureEntry((), ()), Runtime(), 0.1, 0.1, 1, ())
print("ready", flush=True)
sys.stdin.readline()
for source in sorted(Path(sys.argv[2]).iterdir()):
    made = publish(Path(sys.argv[1]), "fraud", source)
    print(source.name, made.version, int(made.is_new), flush=True)
"""


def test_processes_that_publish_at_once_agree(tmp_path: Path, registry: Path) -> None:
    """Three processes, the same six files in the same order: six versions, each new to one."""
    sources = tmp_path / "sources"
    sources.mkdir()
    for k in range(6):
        put(sources, models.constant(k), f"{k}.onnx")
    command = [sys.executable, "-c", MANY, str(registry), str(sources)]
    started = [
        subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        for _ in range(3)
    ]
    for process in started:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
    for process in started:
        assert process.stdin is not None
        process.stdin.write("\n")
        process.stdin.flush()
    lines = [line.split() for process in started for line in process.communicate()[0].splitlines()]

    assert len(lines) == 18
    assert len({(name, number) for name, number, _ in lines}) == 6
    assert [is_new for _, _, is_new in lines].count("1") == 6
    assert sorted(whole(registry)) == [1, 2, 3, 4, 5, 6]
    assert staged(registry) == []


KILLED = """
import os, random, signal, sys, time
from pathlib import Path
from gateway import admission
from gateway.admission import Admitted
from gateway.publisher import Published, publish
from registry import store
from registry.manifest import Runtime, SignatureEntry

registry, sources, how = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]
admission.admit = lambda _: Admitted(SignatureEntry((), ()), Runtime(), 0.1, 0.1, 1, ())
chance = random.Random(7)

def die_at(left):
    def step(name):
        nonlocal left
        left -= 1
        if left < 0:
            os.kill(os.getpid(), signal.SIGKILL)
    store.steps = step

def start(n):
    child = os.fork()
    if child == 0:
        if how == "step":
            die_at(n - 1)
        publish(registry, "fraud", sources / f"{n}.onnx")
        os._exit(0)
    return child

begin = time.monotonic()
if how == "time":
    os.waitpid(start(0), 0)
span = time.monotonic() - begin
killed = 0
for n in range(1, 200):
    child = start(n)
    if how == "time":
        time.sleep(chance.random() * span)
        os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    killed += os.WIFSIGNALED(status)
    print(int(os.WIFSIGNALED(status)), flush=True)
    sys.stdin.readline()
    if (how == "step" and not os.WIFSIGNALED(status)) or (how == "time" and killed == 50):
        break
"""


@pytest.mark.parametrize("how", ["step", "time"])
def test_publishers_killed_anywhere_leave_whole_versions_or_none(
    tmp_path: Path, registry: Path, how: str
) -> None:
    """At every step in turn, and 50 at random moments: the old or the new, never a part."""
    sources = tmp_path / "sources"
    sources.mkdir()
    for k in range(200):
        put(sources, models.constant(k), f"{k}.onnx")
    killed = 0
    known: dict[int, str] = {}
    with subprocess.Popen(
        [sys.executable, "-c", KILLED, str(registry), str(sources), how],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as script:
        assert script.stdin is not None
        assert script.stdout is not None
        for line in script.stdout:
            killed += int(line)
            found = whole(registry)
            assert known.items() <= found.items()
            assert len(set(found.values())) == len(found)
            known = found
            script.stdin.write("\n")
            script.stdin.flush()
    assert script.returncode == 0
    assert killed == 50 if how == "time" else killed >= 10

    left = sources / "last.onnx"
    left.write_bytes(models.identity())
    publish(registry, "fraud", left)
    assert staged(registry) == []
    assert len(whole(registry)) == len(known) + 1


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO])
@pytest.mark.usefixtures("trusting")
def test_when_any_call_fails_nothing_is_published_or_all_is(
    tmp_path: Path,
    registry: Path,
    monkeypatch: pytest.MonkeyPatch,
    code: int,
) -> None:
    """The n-th step fails, for every n until none does; then a second try succeeds."""
    source = put(tmp_path, models.constant(1))
    n_failed = 0
    for n in range(200):
        left = n

        def fail(_: str) -> None:
            nonlocal left
            left -= 1
            if left == -1:
                raise OSError(code, "injected")

        monkeypatch.setattr(store, "steps", fail)
        name = f"model{n}"
        said = ""
        try:
            publish(registry, name, source)
        except StorageError as error:
            said = str(error)
            n_failed += 1
        assert not said or os.strerror(code) in said
        assert str(tmp_path) not in said
        monkeypatch.setattr(store, "steps", lambda _: None)
        found = whole(registry, name)
        assert found.keys() <= {1}
        assert publish(registry, name, source).version == 1
        assert list((registry / name / store.STAGING).iterdir()) == []
        if left >= 0:
            break
    assert n_failed >= 10


@pytest.mark.usefixtures("trusting")
def test_a_full_disk_leaves_what_was_there(tmp_path: Path) -> None:
    """On a file system of four MiB."""
    root = tmp_path / "small"
    root.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(root)]
    try:
        done = subprocess.run(mount, check=False, capture_output=True)
    except FileNotFoundError:
        pytest.skip("no mount on this machine")
    if done.returncode:
        pytest.skip("mounting is not permitted here")
    try:
        publish(root, "fraud", put(tmp_path, models.constant(1)))
        with pytest.raises(StorageError, match="No space left"):
            publish(root, "fraud", put(tmp_path, models.heavy(8)))
        assert sorted(whole(root)) == [1]
        assert staged(root) == []
        assert publish(root, "fraud", put(tmp_path, models.constant(2))).version == 2
    finally:
        subprocess.run(["umount", str(root)], check=True)


def looking(parent: int) -> list[int]:
    """Processes of the first look that this one has started."""
    found = []
    for entry in Path("/proc").iterdir():
        with contextlib.suppress(OSError, IndexError):
            words = (entry / "cmdline").read_bytes()
            above = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
            if b"gateway.admission.child" in words and above == parent:
                found.append(int(entry.name))
    return found


@pytest.mark.usefixtures("trusting")
def test_a_killed_publisher_takes_its_child_along(tmp_path: Path, registry: Path) -> None:
    """The process that opens a model must not go on for nobody."""
    source = put(tmp_path, models.slow(n_rounds=10_000_000))
    code = (
        "import sys; from pathlib import Path; from gateway.publisher import publish;"
        "publish(Path(sys.argv[1]), 'fraud', Path(sys.argv[2]))"
    )

    def working() -> list[int]:
        """Its fork server, and the child of that."""
        servers = looking(publisher.pid)
        return servers + [child for server in servers for child in looking(server)]

    with subprocess.Popen([sys.executable, "-c", code, str(registry), str(source)]) as publisher:
        wait_until(lambda: len(working()) == 2, "the child runs")
        server, child = working()
        publisher.kill()
    for left in (server, child):
        wait_until(lambda left=left: not Path(f"/proc/{left}").exists(), "it is gone")

    assert publish(registry, "fraud", put(tmp_path, models.constant(1))).version == 1
    assert staged(registry) == []


def test_lineage_may_hold_anything_that_json_holds(tmp_path: Path, registry: Path) -> None:
    """And comes back as it went."""
    lineage: dict[str, Any] = {"parents": [{"model": "fraud", "version": 6}], "é": [None, 1.5]}

    publish(registry, "fraud", put(tmp_path, models.constant(1)), lineage=lineage)

    text = (registry / "fraud" / "1" / "manifest.json").read_text()
    assert json.loads(text)["lineage"].items() >= lineage.items()
    files = VersionFiles("fraud", 1, registry / "fraud" / "1")
    described = catalog.read_manifest("fraud", 1, files.directory)
    assert described is not None
    assert described.lineage.items() >= lineage.items()


def test_equal_files_are_one_version_also_when_one_publisher_names_a_number(
    tmp_path: Path, registry: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who comes while another is about to take 5 is told 5, and does not take 1."""
    file = tmp_path / "m.onnx"
    file.write_bytes(models.constant(1))
    second: list[Published] = []
    other = threading.Thread(target=lambda: second.append(publish(registry, "fraud", file)))

    def step(name: str) -> None:
        if name == "rename directory" and not other.ident:
            other.start()
            other.join(2)  # Long enough to take a number, if it may.

    monkeypatch.setattr(store, "steps", step)
    first = publish(registry, "fraud", file, version=5)
    other.join(30)
    assert (first.version, first.is_new) == (5, True)
    assert [(made.version, made.is_new) for made in second] == [(5, False)]
    assert not [*(registry / "fraud").glob(".publish*")], "nothing is left over"


def test_a_registry_is_made_if_only_its_last_part_is_missing(tmp_path: Path) -> None:
    """As a first publish finds it; what looks like a slip is told instead."""
    file = tmp_path / "m.onnx"
    file.write_bytes(models.constant(1))
    made = publish(tmp_path / "new", "fraud", file)
    assert (made.version, len(made.problems)) == (1, 1)
    assert "it was made" in made.problems[0]
    assert publish(tmp_path / "new", "fraud", file).problems == ()
    for path, why in ((tmp_path / "a" / "b", "nor the one"), (file, "not a directory")):
        with pytest.raises(BadRequestError, match=why):
            publish(path, "fraud", file)
    assert not (tmp_path / "a").exists()
