"""What an ONNX file names, read from its bytes: operators, domains, files of weights.

The file is walked as protobuf on the wire, without being built in memory: tensors are passed over,
so that gigabytes of weights cost nothing. Nothing of it is run, and nothing is opened.
Field numbers: onnx.proto, which adds fields and never renumbers.
"""

import mmap
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from gateway.errors import VersionRefusedError

NODES_MAX = 100_000
DEPTH_MAX = 32
"""Graphs within graphs (bodies of If, Loop, Scan) and functions."""

DOMAINS = frozenset(("", "ai.onnx", "ai.onnx.ml", "com.microsoft"))
"""Operators of these are onnxruntime's own; no library of others is ever loaded."""
UNBOUNDED = frozenset(
    (
        "ConstantOfShape",
        "Expand",
        "Loop",
        "RandomNormal",
        "RandomNormalLike",
        "RandomUniform",
        "RandomUniformLike",
        "Range",
        "Resize",
        "Scan",
        "Tile",
        "Upsample",
    )
)
"""Operators whose time or output can be far larger than their input."""

_GRAPH, _OPSETS, _FUNCTIONS = 7, 8, 25
_NODES, _INITIALIZERS, _SPARSE_INITIALIZERS = 1, 5, 15
_OP_TYPE, _ATTRIBUTES, _DOMAIN = 4, 5, 7
_TENSOR, _SUBGRAPH, _TENSORS, _SUBGRAPHS, _SPARSE, _SPARSES = 5, 6, 10, 11, 22, 23
_EXTERNAL = 13
_FUNCTION_NAME, _FUNCTION_NODES, _FUNCTION_DOMAIN = 1, 7, 10


@dataclass(slots=True)
class Graph:
    """What was found."""

    opsets: dict[str, int] = field(default_factory=dict)
    operators: set[tuple[str, str]] = field(default_factory=set)
    """Domain and name of every operator used."""
    functions: set[tuple[str, str]] = field(default_factory=set)
    """Domain and name of every operator that the model defines itself."""
    external: set[str] = field(default_factory=set)
    """Where the model says that weights are, in its own words."""
    n_nodes: int = 0

    @property
    def flagged(self) -> tuple[str, ...]:
        """Operators that may take unbounded time or memory."""
        return tuple(sorted({name for _, name in self.operators} & UNBOUNDED))

    def check(self) -> None:
        """Refuse operators that nobody here knows.

        Raises
        ------
        VersionRefusedError : an operator is of another domain, and not defined in the model.
        """
        for domain, name in sorted(self.operators - self.functions):
            if domain not in DOMAINS:
                raise VersionRefusedError(
                    f"cannot be served: operator {name[:64]!r} is of the domain"
                    f" {domain[:64]!r}; those of onnxruntime itself can be"
                )


def read(file: Path) -> Graph:
    """Walk an ONNX file.

    Raises
    ------
    VersionRefusedError : it is no ONNX file, or has too many nodes or too deep graphs.
    OSError : it cannot be read.
    """
    found = Graph()
    try:
        with file.open("rb") as stream:
            # Not closed by hand: parts of it are still referred to when the walk is broken off.
            _model(memoryview(mmap.mmap(stream.fileno(), 0, prot=mmap.PROT_READ)), found)
    except (ValueError, IndexError, UnicodeDecodeError):
        raise VersionRefusedError("cannot be opened: it is no ONNX file") from None
    return found


def _model(data: memoryview, found: Graph) -> None:
    for number, part in _fields(data):
        if number == _GRAPH:
            _graph(part, found, 1)
        elif number == _OPSETS:
            _opset(part, found)
        elif number == _FUNCTIONS:
            _function(part, found)


def _opset(data: memoryview, found: Graph) -> None:
    domain, version = "", 0
    for number, value in _fields(data, varints=True):
        if number == 1:
            domain = _text(value)
        elif number == 2:
            version = int.from_bytes(value, "little")
    found.opsets[domain] = version


def _function(data: memoryview, found: Graph) -> None:
    texts = {_FUNCTION_NAME: "", _FUNCTION_DOMAIN: ""}
    for number, value in _fields(data):
        if number in texts:
            texts[number] = _text(value)
        elif number == _FUNCTION_NODES:
            _node(value, found, 1)
    found.functions.add((texts[_FUNCTION_DOMAIN], texts[_FUNCTION_NAME]))


def _graph(data: memoryview, found: Graph, depth: int) -> None:
    if depth > DEPTH_MAX:
        raise VersionRefusedError(f"cannot be served: graphs are nested more than {DEPTH_MAX} deep")
    for number, part in _fields(data):
        if number == _NODES:
            _node(part, found, depth)
        elif number == _INITIALIZERS:
            _tensor(part, found)
        elif number == _SPARSE_INITIALIZERS:
            _sparse(part, found)


def _node(data: memoryview, found: Graph, depth: int) -> None:
    found.n_nodes += 1
    if found.n_nodes > NODES_MAX:
        raise VersionRefusedError(f"cannot be served: it has more than {NODES_MAX} nodes")
    name = domain = ""
    for number, part in _fields(data):
        if number == _OP_TYPE:
            name = _text(part)
        elif number == _DOMAIN:
            domain = _text(part)
        elif number == _ATTRIBUTES:
            for inner, value in _fields(part):
                if inner in {_SUBGRAPH, _SUBGRAPHS}:
                    _graph(value, found, depth + 1)
                elif inner in {_TENSOR, _TENSORS}:
                    _tensor(value, found)
                elif inner in {_SPARSE, _SPARSES}:
                    _sparse(value, found)
    found.operators.add((domain, name))


def _sparse(data: memoryview, found: Graph) -> None:
    for number, part in _fields(data):
        if number in {1, 2}:  # values, indices
            _tensor(part, found)


def _tensor(data: memoryview, found: Graph) -> None:
    for number, part in _fields(data):
        if number == _EXTERNAL:
            entry = {inner: _text(value) for inner, value in _fields(part)}
            if entry.get(1) == "location":
                found.external.add(entry.get(2, ""))


def _text(data: memoryview) -> str:
    return str(data[:1024], "utf-8")


def _fields(data: memoryview, *, varints: bool = False) -> Iterator[tuple[int, memoryview]]:
    """Number and bytes of each field that holds bytes; of plain integers too, if wanted."""
    at, end = 0, len(data)
    while at < end:
        key, at = _varint(data, at)
        kind = key & 7
        if kind == 2:
            size, at = _varint(data, at)
            if size > end - at:
                raise ValueError("cut off")
            yield key >> 3, data[at : at + size]
            at += size
        elif kind == 0:
            value, at = _varint(data, at)
            if varints:
                yield key >> 3, memoryview(value.to_bytes(10, "little"))
        elif kind in {1, 5}:
            at += 8 if kind == 1 else 4
        else:
            raise ValueError("no such kind of field")
    if at != end:
        raise ValueError("cut off")


def _varint(data: memoryview, at: int) -> tuple[int, int]:
    value = 0
    for shift in range(0, 70, 7):
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
    raise ValueError("an integer without an end")
