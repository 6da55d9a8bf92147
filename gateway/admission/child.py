"""The process that opens a model file first: limits itself, opens, runs once, says what it found.

    python -m gateway.admission.child LINE

LINE is the number of a socket, on which requests come, each with a pipe (see forkserver.py). One
child is forked for each; it writes lines of JSON into the pipe: the stage it is at, then the
verdict or the refusal. How it ended is the answer on the socket.
"""

import ctypes
import gc
import os
import resource
import select
import signal
import socket
import sys
import time
from pathlib import Path

import msgspec
import numpy as np

from gateway.admission import Admitted, Report, graph
from gateway.admission.forkserver import REQUEST_BYTES_MAX, Reply, Request
from gateway.config import RuntimeConfig
from gateway.errors import GatewayError
from gateway.runtime import Session
from gateway.tensors import DTYPES, Array
from registry.manifest import Runtime, signature_entry
from registry.signature import Signature, TensorSpec

_PR_SET_PDEATHSIG = 1
_LIBC = ctypes.CDLL(None)
_IDENTITY = (
    b'\x08\x08:7\n\x10\n\x01x\x12\x01y"\x08Identity\x12\x01g'
    b"Z\x0f\n\x01x\x12\n\n\x08\x08\x01\x12\x04\n\x02\x08\x01"
    b"b\x0f\n\x01y\x12\n\n\x08\x08\x01\x12\x04\n\x02\x08\x01"
    b"B\x04\n\x00\x10\x11"
)
"""An ONNX file of one node."""


def main() -> None:
    """Have a child look for each request, until nobody can ask any more."""
    line = socket.socket(fileno=int(sys.argv[1]))
    _look_at_ours()
    gc.collect()
    gc.freeze()
    while True:
        asked, pipes, _, _ = socket.recv_fds(line, REQUEST_BYTES_MAX, 1)
        if not asked:
            return
        request = msgspec.json.decode(asked, type=Request)
        line.send(msgspec.json.encode(Reply(_in_child(line, request, *pipes))))


def _in_child(line: socket.socket, request: Request, pipe: int) -> int:
    """Fork, and wait for the child or for the end of who asked; how the child ended."""
    ended, held = os.pipe()
    server = os.getpid()
    child = os.fork()
    if not child:
        try:
            line.close()
            _say_what_is_found(pipe, request, server)
            os._exit(0)  # without the clean-up of native code, which could crash as well
        finally:
            os._exit(1)
    os.close(pipe)
    os.close(held)
    waiting = select.poll()
    waiting.register(ended, 0)
    waiting.register(line, select.POLLIN)
    if waiting.poll()[0][0] != ended:
        os.kill(child, signal.SIGKILL)
    os.close(ended)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def _say_what_is_found(out: int, request: Request, parent: int) -> None:
    _limit(request.memory_bytes, request.seconds, parent)
    try:
        _say(out, Report(admitted=_look(out, Path(request.file))))
    except GatewayError as error:
        _say(out, Report(refused=str(error)))
    except MemoryError:
        _say(out, Report(refused="cannot be served: it takes more memory than a trial may"))


def _look_at_ours() -> None:
    """Do once what is done at the first look only, so that no child needs to."""
    file = os.memfd_create("identity")
    os.write(file, _IDENTITY)
    _look(os.open(os.devnull, os.O_WRONLY), Path(f"/proc/self/fd/{file}"))
    os.close(file)


def _look(out: int, file: Path) -> Admitted:
    found = graph.read(file)
    found.check()
    before = _memory("VmRSS")
    _say(out, Report(stage="open"))
    start = time.perf_counter()
    session = Session(file, RuntimeConfig())
    load_s = time.perf_counter() - start
    _say(out, Report(stage="run"))
    run_s = _run(session)
    return Admitted(
        signature=signature_entry(session.signature),
        runtime=Runtime(opsets=found.opsets),
        load_s=round(load_s, 6),
        run_s=round(run_s, 6),
        rss_bytes=max(0, _memory("VmHWM") - before),
        flagged=found.flagged,
    )


def _run(session: Session) -> float:
    """Seconds of the first run on zeros; 0 when zeros of no size are accepted."""
    for size in (1, 8, 32):  # of free axes behind the first
        zeros = _zeros(session.signature, size)
        if sum(array.nbytes for array in zeros) > 1 << 28:
            break
        start = time.perf_counter()
        try:
            session.run(zeros)
        except GatewayError as error:
            # Values may be refused: zeros are none that a model must take. Memory may not.
            if "alloc" in str(error.__context__).lower():
                raise MemoryError from None
            continue
        return time.perf_counter() - start
    return 0.0


def _zeros(signature: Signature, size: int) -> list[Array]:
    return [_zero(spec, size) for spec in signature.inputs]


def _zero(spec: TensorSpec, size: int) -> Array:
    shape = tuple(n if n >= 0 else (1 if k == 0 else size) for k, n in enumerate(spec.shape))
    if spec.datatype == "BYTES":
        return np.full(shape, "", dtype=np.object_)
    return np.zeros(shape, DTYPES[spec.datatype])


def _limit(memory: int, seconds: float, parent: int) -> None:
    """Take no more than this, write no file, leave no core, and end with the parent."""
    _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)
    now = _memory("VmSize")
    cpu = int(seconds) + 1
    for what, limit in (
        (resource.RLIMIT_AS, now + memory),
        (resource.RLIMIT_CPU, cpu),
        (resource.RLIMIT_FSIZE, 0),
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_NOFILE, 64),
    ):
        _, most = resource.getrlimit(what)
        bound = limit if most == resource.RLIM_INFINITY else min(limit, most)
        resource.setrlimit(what, (bound, bound))


def _memory(what: str) -> int:
    """A figure of /proc/self/status in bytes."""
    with Path("/proc/self/status").open(encoding="ascii") as lines:
        for line in lines:
            if line.startswith(what + ":"):
                return int(line.split()[1]) * 1024
    return 0


def _say(out: int, report: Report) -> None:
    os.write(out, msgspec.json.encode(report) + b"\n")


if __name__ == "__main__":
    main()
