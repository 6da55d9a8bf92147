"""The process that opens a model file first: limits itself, opens, runs once, says what it found.

    python -m gateway.admission.child MODEL_FILE MEMORY_BYTES SECONDS PARENT

Lines of JSON go to standard output: the stage it is at, then the verdict or the refusal.
"""

import ctypes
import os
import resource
import signal
import sys
import time
from pathlib import Path

import msgspec
import numpy as np

from gateway.admission import Admitted, Report, graph
from gateway.config import RuntimeConfig
from gateway.errors import GatewayError
from gateway.runtime import Session
from gateway.tensors import DTYPES, Array
from registry.manifest import Runtime, signature_entry
from registry.signature import Signature, TensorSpec

_PR_SET_PDEATHSIG = 1


def main() -> None:
    """Look at one model file."""
    file, memory, seconds, parent = sys.argv[1:]
    out = os.dup(1)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # native code may print: not into our lines
    _limit(int(memory), float(seconds), int(parent))
    try:
        _say(out, Report(admitted=_look(out, Path(file))))
    except GatewayError as error:
        _say(out, Report(refused=str(error)))
    except MemoryError:
        _say(out, Report(refused="cannot be served: it takes more memory than a trial may"))
    os._exit(0)  # without the clean-up of native code, which could crash as well


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
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
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
