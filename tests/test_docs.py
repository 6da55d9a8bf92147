"""Reads README and docs as a user would: runs their blocks, compares their tables with the code.

The convention for blocks is in CONTRIBUTING.md, "Documentation that runs".
"""

import contextlib
import io
import itertools
import json
import os
import re
import selectors
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from string import Template
from typing import Any

import msgspec
import numpy as np
import pytest
import typer
import yaml

from gateway import config, errors, telemetry
from gateway.app import App
from gateway.capture.record import Record
from gateway.cli import app as command_line
from gateway.endpoints.predict import is_prediction
from gateway.endpoints.stream import is_stream
from monitors import Profile
from registry import buckets, manifest, revisions, routes

ROOT = Path(__file__).parents[1]
PAGES = sorted(ROOT.glob("*.md")) + sorted((ROOT / "docs").rglob("*.md"))
DEADLINE_S = 30.0

_FENCE = re.compile(r"^```(\w*)\s*$")
_SETUP = re.compile(r"^<!-- setup: flights -->$", re.MULTILINE)
_NOT_RUN = re.compile(r"^<!-- not run: (.+) -->$")
_NUMBER = re.compile(r"\d+(?:\.\d+)?(?:e[-+]?\d+)?")
_BARS = re.compile("[▁▂▃▄▅▆▇█░]+")


# -- pages


@dataclass
class Block:
    """One fenced block of a page."""

    kind: str
    lines: list[str]
    at: int
    """Number of its first line."""
    printed: list[str] = field(default_factory=list)
    """Of a python block: what it must print."""
    skip: str = ""
    """Why it is not run; empty when it is."""


def blocks_of(page: Path) -> list[Block]:
    """All fenced blocks; a text block right behind a python block becomes what that prints."""
    found: list[Block] = []
    inside: Block | None = None
    since: list[str] = []  # lines since the last block that were not empty
    for number, line in enumerate(page.read_text(encoding="utf-8").splitlines(), 1):
        if inside is not None:
            if line == "```":
                found.append(inside)
                inside, since = None, []
            else:
                inside.lines.append(line)
        elif match := _FENCE.match(line):
            mark = _NOT_RUN.match(since[-1]) if since else None
            inside = Block(match[1], [], number + 1, skip=mark[1] if mark else "")
            if match[1] == "text" and not since and found and found[-1].kind == "python":
                inside.lines = found[-1].printed
                inside.kind = "printed"
        elif line.strip():
            since.append(line)
    assert inside is None, f"{page.name}: the block at line {inside and inside.at} has no end"
    return found


def runnable(page: Path) -> list[Block]:
    return [b for b in blocks_of(page) if b.kind in {"python", "console"} and not b.skip]


def name_of(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


# -- comparing what is printed


def normalised(line: str) -> str:
    """Numbers become 0, bars vanish, runs of spaces become one: those differ between machines."""
    return " ".join(_NUMBER.sub("0", _BARS.sub(" ", line)).split())


def missing_line(expected: list[str], printed: str) -> str | None:
    """The first expected line that did not come, in order; None when all did.

    A line `...` stands for any lines; `...` within a line stands for anything.
    """
    came = iter(normalised(line) for line in printed.splitlines())
    for line in expected:
        if line.strip() in {"", "..."}:
            continue
        parts = [re.escape(part.strip()) for part in normalised(line).split("...")]
        pattern = re.compile(r"\s*.*\s*".join(parts))
        if not any(pattern.fullmatch(candidate) for candidate in came):
            return line
    return None


# -- running blocks


@dataclass
class Command:
    """One `$ ` line of a console block, with what it must print and its exit code."""

    text: str
    expected: list[str] = field(default_factory=list)
    code: int = 0

    @property
    def is_background(self) -> bool:
        return self.text.rstrip().endswith("&")


def commands_of(block: Block) -> list[Command]:
    commands: list[Command] = []
    for line in block.lines:
        if commands and commands[-1].text.endswith("\\"):
            commands[-1].text += "\n" + line
        elif line.startswith("$ "):
            code = re.search(r"#.*\bexit (\d+)\s*$", line)
            commands.append(Command(line[2:], code=int(code[1]) if code else 0))
        else:
            assert commands, f"a console block must start with '$ ', not {line!r}"
            commands[-1].expected.append(line)
    return commands


class Shell:
    """A real bash in a directory of its own, spoken to line by line; ends all that it started."""

    def __init__(self, directory: Path, port: int, grpc_port: int) -> None:
        binaries = str(Path(sys.executable).parent)
        self._process = subprocess.Popen(
            ["bash", "--norc", "--noprofile"],
            cwd=directory,
            env={
                "PATH": os.pathsep.join([binaries, os.environ["PATH"]]),
                "HOME": str(directory),
                "LANG": "C.UTF-8",
                "COLUMNS": "200",
                "DRIFTGATE_PORT": str(port),
                "DRIFTGATE_GRPC_PORT": str(grpc_port),
                "DRIFTGATE_SERVER": f"http://127.0.0.1:{port}",
                "DRIFTGATE_LOG_FORMAT": "text",
            },
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        assert self._process.stdout is not None
        os.set_blocking(self._process.stdout.fileno(), False)
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._process.stdout, selectors.EVENT_READ)
        self._marks = itertools.count()

    def run(self, command: Command) -> None:
        """Run one command; fails when it ends otherwise, or prints something else."""
        if command.is_background:
            self._write(command.text + "\n")
            printed = self._until(lambda text: missing_line(command.expected, text) is None)
            code = command.code
        else:
            mark = f"<<{next(self._marks)}:"
            # The newline goes first, so that a trailing comment or here-document ends there.
            self._write(f"{command.text}\ncode=$?; echo; echo '{mark}'$code'>>'\n")
            printed = self._until(lambda text: re.search(re.escape(mark) + r"\d+>>", text))
            found = re.search(re.escape(mark) + r"(\d+)>>", printed)
            code = int(found[1]) if found else -1
        wrong = missing_line(command.expected, printed)
        assert wrong is None, f"$ {command.text}\nnever printed {wrong!r}, but:\n{printed}"
        assert code == command.code, f"$ {command.text}\nexit code {code}:\n{printed}"

    def close(self) -> None:
        """End the servers that were left running; each must end well."""
        assert self._process.stdin is not None
        try:
            self._write(
                'bad=0; for job in $(jobs -p); do kill "$job"; wait "$job" || bad=$?; done\n'
                "exit $bad\n"
            )
            self._process.stdin.close()
            assert self._process.wait(DEADLINE_S) == 0, "a background command did not end well"
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
            self._selector.close()
            assert self._process.stdout is not None
            self._process.stdout.close()

    def _write(self, text: str) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(text.encode())
        self._process.stdin.flush()

    def _until(self, is_enough: Any) -> str:
        """Everything printed until that is enough, or the time is over."""
        printed, until = b"", time.monotonic() + DEADLINE_S
        assert self._process.stdout is not None
        while not is_enough(printed.decode(errors="replace")) and time.monotonic() < until:
            if self._selector.select(0.2):
                chunk = self._process.stdout.read()
                if not chunk:
                    break
                printed += chunk
        return printed.decode(errors="replace")


def run_page(page: Path, directory: Path) -> None:
    """All blocks of a page, in order, in one directory, one shell and one namespace."""
    for tool in ("bash", "curl"):
        if shutil.which(tool) is None and any(
            re.search(rf"\b{tool}\b", line) or tool == "bash"
            for block in runnable(page)
            if block.kind == "console"
            for line in block.lines
        ):
            pytest.skip(f"this machine has no {tool}, which the page uses")
    if _SETUP.search(page.read_text(encoding="utf-8")):
        lay_out(directory)
    port, grpc_port = free_port(), free_port()
    shell = Shell(directory, port, grpc_port)
    space: dict[str, Any] = {"__name__": "__docs__"}
    try:
        for block in runnable(page):
            lines = [
                re.sub(r"\b8000\b", str(port), re.sub(r"\b8001\b", str(grpc_port), line))
                for line in block.lines
            ]
            if block.kind == "console":
                for command in commands_of(Block("console", lines, block.at)):
                    shell.run(command)
            else:
                # Empty lines in front, so that a trace shows the page's own line numbers.
                source = "\n" * (block.at - 1) + "\n".join(lines)
                printed = run_python(compile(source, str(page), "exec"), space, directory)
                wrong = missing_line(block.printed, printed)
                assert wrong is None, f"line {block.at}: {wrong!r} is not in:\n{printed}"
    finally:
        shell.close()


def run_python(code: Any, space: dict[str, Any], directory: Path) -> str:
    printed = io.StringIO()
    with contextlib.chdir(directory), contextlib.redirect_stdout(printed):
        exec(code, space)  # the page's own code is what is tested
    return printed.getvalue()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


@pytest.mark.parametrize("page", [page for page in PAGES if runnable(page)], ids=name_of)
def test_every_block_of_the_page_does_what_the_page_says(
    page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Python and console blocks run in order, with real servers, and print what stands there."""
    for name in [name for name in os.environ if name.lower().endswith("_proxy")]:
        monkeypatch.delenv(name)  # the server is on this machine, and no proxy's business
    run_page(page, tmp_path)


def test_most_pages_that_teach_have_something_to_run() -> None:
    """The test above proves nothing if no block is found."""
    with_blocks = {name_of(page) for page in PAGES if runnable(page)}

    assert {"README.md", "docs/tutorial.md", "docs/reference/python.md"} <= with_blocks
    assert len(with_blocks) >= 8


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_blocks_have_a_kind_that_is_known_and_a_reason_when_not_run(page: Path) -> None:
    """A block that is neither run nor marked is a promise that nobody keeps."""
    known = {"python", "console", "text", "printed", "mermaid", "json", "yaml", "promql"}
    for block in blocks_of(page):
        assert block.kind in known, f"line {block.at}: kind {block.kind!r}"
        assert not block.skip or len(block.skip) > 10, f"line {block.at}: give a reason"


@pytest.mark.parametrize(
    ("expected", "printed", "fits"),
    [
        (["a 12 b"], "a  7 b", True),
        (["a", "...", "c"], "a\nb\nc", True),
        (["temp ... alarm"], "temp 1 ▁▂ 2 alarm", True),
        (["c", "a"], "a\nc", False),
        (["a"], "ab", False),
        (["a."], "ab", False),
        (["ready"], "", False),
    ],
)
def test_printed_lines_are_compared_in_order_and_without_their_numbers(
    expected: list[str], printed: str, fits: bool
) -> None:
    """The comparison is loose about numbers and nothing else."""
    assert (missing_line(expected, printed) is None) is fits


def test_a_page_that_lies_is_noticed(tmp_path: Path) -> None:
    """A wrong line, a wrong exit code and a wrong answer in python each fail the page."""
    lies = {
        "line": "```console\n$ echo yes\nno\n```\n",
        "code": "```console\n$ false\n```\n",
        "answer": "```python\nprint(1 + 1)\n```\n\n```text\ntwo\n```\n",
    }
    for name, text in lies.items():
        page = tmp_path / f"{name}.md"
        page.write_text(text)
        with pytest.raises(AssertionError, match=r"never printed|exit code|is not in"):
            run_page(page, tmp_path)


# -- tables against code


def tables(page: str) -> Iterator[list[list[str]]]:
    """Every table of a page as rows of cells; code marks are taken off."""
    rows: list[list[str]] = []
    for line in [*(ROOT / page).read_text(encoding="utf-8").splitlines(), ""]:
        if line.startswith("|"):
            cells = [cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]]
            rows.append([cell.replace("`", "").replace("\\|", "|") for cell in cells])
        elif rows:
            yield [rows[0], *rows[2:]]
            rows = []


def table(page: str, *header: str) -> list[list[str]]:
    """Rows of all tables of the page whose first header cells are these."""
    found = [row for t in tables(page) if t[0][: len(header)] == list(header) for row in t[1:]]
    assert found, f"{page} has no table {header}"
    return found


def test_settings_page_lists_every_setting_with_its_type_and_default() -> None:
    """Same keys, in the same order, as the declarations; each with a meaning."""
    listed = table("docs/reference/settings.md", "key", "variable", "type", "default")
    declared = [
        [setting.key, setting.variable, setting.type.__name__, as_written(setting.default)]
        for setting in config.settings()
    ]

    assert [row[:4] for row in listed] == declared
    assert [row[0] for row in listed if len(row[-1]) < 10] == []


def as_written(default: object) -> str:
    """A default as the page writes it: text without quotes, the rest as in JSON."""
    return default if isinstance(default, str) else json.dumps(default)


def test_settings_page_names_the_flags_that_serve_has() -> None:
    """Every option of `serve` that sets something is in the column, and nothing else."""
    listed = table("docs/reference/settings.md", "key", "variable", "type", "default", "flag")
    flags = {row[4] for row in listed} - {"", "REGISTRY"}

    assert flags == options_of("serve") - {"--config", "--help"}


def test_metrics_page_lists_every_family_with_its_labels() -> None:
    """Name, kind, labels and help text as they are declared."""
    listed = table("docs/reference/metrics.md", "metric", "kind", "labels", "meaning")
    declared = [
        [family.name, family.kind, ", ".join(family.labels), family.help]
        for family in telemetry.FAMILIES
    ]

    assert [row[:4] for row in listed] == declared


def test_errors_page_lists_every_error_that_reaches_a_client() -> None:
    """Code and status of each, and no other."""
    listed = table("docs/reference/errors.md", "code", "status", "gRPC")
    declared = {(error.code, str(error.status), error.grpc_status) for error in errors.ALL}

    assert {(row[0], row[1], row[2]) for row in listed} == declared
    assert len(listed) == len(declared)


def test_http_page_lists_every_path_with_its_scope() -> None:
    """Verb, path, scope and sentence of each, also of those answered before any routing."""
    listed = table("docs/reference/http.md", "verb", "path", "scope", "what")
    app = App(config.ServerConfig())
    raw = [e for e in app.declared() if e not in app.endpoints]

    for endpoint in raw:
        path = endpoint.path.format(model="m", version=1)
        assert is_prediction(path) or is_stream(path), path
        assert endpoint.scope == "predict"
    assert {tuple(row[:4]) for row in listed} == {
        (e.method, e.path, e.scope, e.summary) for e in app.declared()
    }
    assert len(raw) == 4


def subcommands() -> dict[str, Any]:
    return dict(typer.main.get_command(command_line).commands)  # type: ignore[attr-defined]


def options_of(name: str) -> set[str]:
    """Long options of a command, or of all commands of a group."""
    command = subcommands()[name]
    below = getattr(command, "commands", {}).values()
    parameters = [*command.params, *(p for one in below for p in one.params)]
    return {
        option
        for parameter in parameters
        if parameter.param_type_name == "option"
        for option in parameter.opts
        if option.startswith("--")
    }


def test_command_line_page_lists_every_command_and_its_options() -> None:
    """A section per command, in it a table of all options."""
    text = (ROOT / "docs/reference/cli.md").read_text(encoding="utf-8")
    sections = dict(
        re.findall(r"^## driftgate (\w+)\n(.*?)(?=^## |\Z)", text, flags=re.MULTILINE | re.DOTALL)
    )

    assert list(sections) == list(subcommands())
    for name, section in sections.items():
        in_table = "\n".join(line for line in section.splitlines() if line.startswith("|"))
        assert set(re.findall(r"--[a-z][a-z-]*", in_table)) == options_of(name) - {"--help"}, name


def test_profile_page_lists_the_fields_that_are_written() -> None:
    """Fields of a profile that has a channel of every kind."""
    columns = {
        "numeric": np.array([0.5, 1.5, 2.5, 2.5]),
        "integer": np.array([1, 2, 3, 3]),
        "boolean": np.array([True, False, True, True]),
        "categorical": np.array(["a", "b", "b", "b"], dtype=object),
    }
    written = json.loads(Profile.fit(columns).to_json())

    listed = table("docs/reference/profile-format.md", "field", "holds")
    assert {row[0] for row in listed} == set(written)
    of_channel = table("docs/reference/profile-format.md", "channel field", "kinds")
    for channel in written["channels"]:
        assert channel["kind"] == channel["name"]
        documented = {row[0] for row in of_channel if channel["kind"] in row[1] or row[1] == "all"}
        assert documented == set(channel), channel["kind"]


def test_route_page_lists_every_field_with_its_default() -> None:
    """Same parts and fields, in the same order, as the declarations; each with a meaning."""
    listed = table("docs/reference/route-format.md", "part", "field", "default")
    declared = [
        [part.__name__, entry.name, "needed" if entry.required else ""]
        for part in routes.PARTS
        for entry in msgspec.structs.fields(part)
    ]

    assert [row[:2] for row in listed] == [row[:2] for row in declared]
    assert [row[2] == "needed" for row in listed] == [row[2] == "needed" for row in declared]
    assert [row[1] for row in listed if len(row[3]) < 8] == []
    vectors = table("docs/reference/route-format.md", "salt", "unit", "bucket")
    for salt, unit, bucket in vectors:
        assert buckets.bucket_of(bytes.fromhex(salt), unit) == int(bucket)


def test_revision_page_lists_every_field() -> None:
    """Same fields in the same order as the declarations."""
    page = "docs/reference/revision-format.md"
    declared = msgspec.structs.fields(revisions.Revision)
    # Written always, though a reader must find out for itself whether it is there.
    needed = {entry.encode_name for entry in declared if entry.required} | {"format"}

    listed = table(page, "field", "needed", "holds")
    assert [row[0] for row in listed] == [entry.encode_name for entry in declared]
    assert {row[0] for row in listed if row[1] == "yes"} == needed
    assert [row[0] for row in table(page, "field of a model", "holds")] == [
        entry.encode_name for entry in msgspec.structs.fields(revisions.ModelState)
    ]


def test_capture_page_lists_every_field_of_a_record() -> None:
    """Same fields in the same order as the declarations; those without a default are needed."""
    declared = msgspec.structs.fields(Record)

    listed = table("docs/reference/capture-format.md", "field", "default", "holds")
    assert [row[0] for row in listed] == [entry.name for entry in declared]
    assert [row[1] == "needed" for row in listed] == [entry.required for entry in declared]


def test_registry_page_lists_the_fields_of_a_manifest() -> None:
    """Same fields, in the same order, as the declarations."""
    parts = {
        "file": manifest.FileEntry,
        "tensor": manifest.TensorEntry,
        "signature": manifest.SignatureEntry,
        "runtime": manifest.Runtime,
        "verdict": manifest.Verdict,
    }
    declared = [[name, field] for name, part in parts.items() for field in part.__struct_fields__]

    listed = table("docs/reference/registry-format.md", "field", "holds")
    assert [row[0] for row in listed] == list(manifest.Manifest.__struct_fields__)
    of_part = table("docs/reference/registry-format.md", "part", "field", "holds")
    assert [row[:2] for row in of_part] == declared


def test_python_page_names_everything_that_monitors_exports() -> None:
    """The public names of the room, each in code marks."""
    import monitors

    text = (ROOT / "docs/reference/python.md").read_text(encoding="utf-8")
    assert [name for name in monitors.__all__ if f"`{name}" not in text] == []


def test_every_test_that_behaviour_names_exists() -> None:
    """A promise names the test that shows it; the test must be there."""
    text = (ROOT / "docs/behaviour.md").read_text(encoding="utf-8")
    named = re.findall(r"`(tests/[\w/.]+\.py)::(\w+)`", text)

    assert len(named) >= 20
    for file, function in named:
        source = (ROOT / file).read_text(encoding="utf-8")
        assert re.search(rf"^(async )?def {function}\(", source, re.MULTILINE), (file, function)
    rows = table("docs/behaviour.md", "promise", "shown by")
    assert [row[0] for row in rows if "::" not in row[1]] == [], "a promise without a test"


def test_architecture_names_files_that_exist() -> None:
    """Where the pages say something is, it is."""
    for page in ("ARCHITECTURE.md", "CONTRIBUTING.md"):
        text = (ROOT / page).read_text(encoding="utf-8")
        for path in re.findall(
            r"`((?:gateway|registry|monitors|tests|bench|docs)/[\w/.-]*)`", text
        ):
            assert (ROOT / path).exists(), f"{page}: {path}"


# -- links, navigation, words


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_between_pages_lead_somewhere(page: Path) -> None:
    """Relative links and their anchors exist."""
    text = re.sub(r"^```.*?^```$", "", page.read_text("utf-8"), flags=re.MULTILINE | re.DOTALL)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"https?://|mailto:", target):
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.exists(), target
        if anchor:
            assert anchor in anchors(file), f"{target}: there are {sorted(anchors(file))}"


def anchors(page: Path) -> set[str]:
    headings = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in headings}


class _SiteLoader(yaml.SafeLoader):
    """Reads the names of Python objects in mkdocs.yml as text; nothing is imported."""


_SiteLoader.add_multi_constructor("tag:yaml.org,2002:python/name:", lambda _, name, __: name)


def test_navigation_holds_every_page_of_docs_once() -> None:
    """mkdocs.yml lists what is there, nothing twice and nothing else."""
    site = yaml.load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"), Loader=_SiteLoader)

    def leaves(entry: Any) -> Iterator[str]:
        if isinstance(entry, str):
            yield entry
        else:
            for inner in entry.values() if isinstance(entry, dict) else entry:
                yield from leaves(inner)

    listed = list(leaves(site["nav"]))
    pages = [p.relative_to(ROOT / "docs").as_posix() for p in (ROOT / "docs").rglob("*.md")]
    assert sorted(listed) == sorted(pages)


def test_decisions_are_numbered_without_gaps_and_have_four_parts() -> None:
    """Context, options, decision, price: one page each."""
    files = sorted((ROOT / "docs/decisions").glob("*.md"))

    assert [file.name[:4] for file in files] == [f"{k:04}" for k in range(1, len(files) + 1)]
    for file in files:
        text = file.read_text(encoding="utf-8")
        assert text.startswith(f"# {file.name[:4]} "), file.name
        headings = re.findall(r"^## (.+)$", text, re.MULTILINE)
        assert headings == ["Context", "Options", "Decision", "Price"], file.name
        assert len(text.splitlines()) <= 80, f"{file.name}: more than a page"


def test_every_dependency_has_its_line_in_the_decision() -> None:
    """A dependency comes with a reason."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    text = (ROOT / "docs/decisions/0006-dependencies.md").read_text(encoding="utf-8").lower()
    wanted = project["dependencies"] + project["optional-dependencies"]["dev"]
    names = [re.split(r"[^A-Za-z0-9_.-]", requirement)[0].lower() for requirement in wanted]

    assert [name for name in names if f"| {name} |" not in text.replace("`", "")] == []


# -- the image: never built by these tests, so its file is read closely


def dockerfile() -> list[tuple[str, str]]:
    """Instructions and their arguments, continued lines joined."""
    text = (ROOT / "Dockerfile").read_text(encoding="utf-8")
    text = re.sub(r"^#.*\n", "", text, flags=re.MULTILINE).replace("\\\n", " ")
    return [(w, r.strip()) for w, _, r in (li.partition(" ") for li in text.splitlines() if li)]


def test_image_runs_as_a_numeric_user_that_is_not_root() -> None:
    """Kubernetes can check `runAsNonRoot` only on a number; the last USER counts."""
    users = [rest for word, rest in dockerfile() if word == "USER"]

    user, _, group = users[-1].partition(":")
    assert int(user) > 0
    assert int(group) > 0


def test_image_copies_only_what_exists_and_is_not_ignored() -> None:
    """Every source of a COPY is in the build's context."""
    ignored = (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines()
    kept = {line[1:].rstrip("/") for line in ignored if line.startswith("!")}
    sources = [
        path
        for word, rest in dockerfile()
        if word == "COPY" and "--from" not in rest
        for path in rest.split()[:-1]
    ]

    assert {"gateway", "registry", "monitors"} <= {path.rstrip("/") for path in sources}
    assert ignored[0] == "*", "what is not named does not come in"
    for path in sources:
        assert (ROOT / path).exists(), path
        assert path.rstrip("/") in kept, path


def test_image_takes_the_extras_that_there_are() -> None:
    """As the shell of the build would put them behind the project, each pinned."""
    (install,) = [rest for word, rest in dockerfile() if word == "RUN" and "pip install" in rest]
    where = shlex.split(install.rpartition(" ")[2])[0]
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    page = (ROOT / "docs/how-to/run-in-a-container.md").read_text(encoding="utf-8")
    (named,) = set(re.findall(r"EXTRAS='\[(.+?)\]'", page))
    pins = (ROOT / "constraints.txt").read_text(encoding="utf-8")

    assert Template(where).substitute(EXTRAS="") == "."
    assert Template(where).substitute(EXTRAS=f"[{named}]") == f".[{named}]"
    for extra in named.split(","):
        for needed in project["optional-dependencies"][extra]:
            name = re.split(r"[\[=<>]", needed)[0]
            assert re.search(rf"^{name}==", pins, re.MULTILINE), name


def test_image_starts_driftgate_itself_with_telemetry_off() -> None:
    """Exec form, so that signals reach the server; the switch is set before any import."""
    instructions = dockerfile()
    entry = json.loads(next(rest for word, rest in instructions if word == "ENTRYPOINT"))
    variables = " ".join(rest for word, rest in instructions if word == "ENV")

    assert entry == ["driftgate"]
    assert "ORT_DISABLE_TELEMETRY=1" in variables
    assert "PYTHONDONTWRITEBYTECODE=1" in variables, "a read-only root has no place for caches"
    for name, value in re.findall(r"(DRIFTGATE_\w+)=(\S+)", variables):
        assert name in {setting.variable for setting in config.settings()}, name
        assert value
    assert "DRIFTGATE_INSECURE" not in variables, "opening the server is its owner's decision"


def test_image_knows_its_health_by_asking_the_server(tmp_path: Path) -> None:
    """The health check's own command: 0 beside a ready server, not 0 without one."""
    check = next(rest for word, rest in dockerfile() if word == "HEALTHCHECK")
    program, *arguments = json.loads(check[check.index("CMD") + 3 :])
    assert program == "python"
    port = free_port()

    def code() -> int:
        # A proxy of the environment must not be asked in place of the server.
        environment = {"PATH": os.environ["PATH"], "DRIFTGATE_PORT": str(port)}
        environment |= {"http_proxy": "http://127.0.0.1:9", "HTTP_PROXY": "http://127.0.0.1:9"}
        return subprocess.run(
            [sys.executable, *arguments], env=environment, capture_output=True, check=False
        ).returncode

    lay_out(tmp_path)
    assert code() != 0
    shell = Shell(tmp_path, port, free_port())
    try:
        shell.run(Command("driftgate serve models &", ["... ready ..."]))
        assert code() == 0
    finally:
        shell.close()


def lay_out(directory: Path) -> None:
    """What the tutorial makes by hand: a registry, the training data, the flights of July."""
    from gateway.demo import sample

    place = directory / "models" / "flights" / "1"
    place.mkdir(parents=True)
    shutil.copy(sample.model_path("january_march"), place / "model.onnx")
    columns = sample.reference()
    rows = zip(*(column.tolist() for column in columns.values()), strict=True)
    lines = [",".join(map(str, row)) for row in (columns, *rows)]
    (directory / "january_march.csv").write_text("\n".join(lines), encoding="utf-8")
    flights = sample.load()
    july = np.flatnonzero(flights.month == 7)
    inputs = [
        {
            "name": name,
            "datatype": "BYTES" if name in sample.LEVELS else "FP32",
            "shape": [len(july), 1],
            "data": column[july].tolist(),
        }
        for name, column in flights.columns.items()
    ]
    (directory / "july.json").write_text(json.dumps({"inputs": inputs}), encoding="utf-8")


def test_wheel_holds_the_three_rooms_and_nothing_else() -> None:
    """What pyproject.toml tells the builder; the image installs that wheel."""
    built = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["hatch"]

    assert sorted(built["build"]["targets"]["wheel"]["packages"]) == [
        "gateway",
        "monitors",
        "registry",
    ]
    assert all((ROOT / room / "py.typed").exists() for room in ("gateway", "monitors", "registry"))


def test_licence_is_the_one_that_the_project_names() -> None:
    """The full text of Apache-2.0."""
    text = (ROOT / "LICENSE").read_text(encoding="utf-8")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]

    assert project["license"] == "Apache-2.0"
    assert "Version 2.0, January 2004" in text
    assert "END OF TERMS AND CONDITIONS" in text


def test_changelog_names_this_release_and_orders_its_headings() -> None:
    """Security, Removed, Deprecated, Added, Changed, Fixed."""
    from gateway import __version__

    text = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    order = ["Security", "Removed", "Deprecated", "Added", "Changed", "Fixed"]
    releases = re.split(r"^## ", text, flags=re.MULTILINE)[1:]

    assert any(__version__ in release.splitlines()[0] for release in releases)
    for release in releases:
        headings = re.findall(r"^### (\w+)", release, re.MULTILINE)
        assert headings == sorted(headings, key=order.index)
