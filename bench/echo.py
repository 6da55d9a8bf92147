"""A bare raw-ASGI app: what an HTTP request costs when nothing is done with it.

It reads the body and answers a constant document shaped like a v2 answer, under uvicorn with the
options that driftgate uses. The yardstick of the other benchmarks, not a question by itself.
"""

import argparse
from collections.abc import Awaitable, Callable
from typing import Any

import uvicorn

Message = dict[str, Any]
App = Callable[
    [Message, Callable[[], Awaitable[Message]], Callable[[Message], Awaitable[None]]],
    Awaitable[None],
]

_OPEN = b'{"model_name":"tabular","model_version":"1","id":"'
_CLOSE = b'","outputs":[{"name":"y","shape":[1,1],"datatype":"FP32","data":[0.4962593913078308]}]}'


def document(n_bytes: int = 0) -> bytes:
    """Build a v2 answer of `n_bytes`, or of its own smallest size if that is more."""
    return _OPEN + b"0" * (n_bytes - len(_OPEN) - len(_CLOSE)) + _CLOSE


def build(answer: bytes) -> App:
    """Make the app that gives this answer to every request."""
    start = {
        "type": "http.response.start",
        "status": 200,
        "headers": [
            (b"content-type", b"application/json"),
            (b"content-length", str(len(answer)).encode()),
        ],
    }
    body = {"type": "http.response.body", "body": answer}

    async def app(
        _scope: Message,
        receive: Callable[[], Awaitable[Message]],
        send: Callable[[Message], Awaitable[None]],
    ) -> None:
        while (await receive()).get("more_body"):
            pass
        await send(start)
        await send(body)

    return app


def main() -> None:
    """Serve on a loopback port until told to stop."""
    parser = argparse.ArgumentParser(prog="python -m bench.echo", description=main.__doc__)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--answer-bytes", type=int, default=0, help="pad the answer to this size")
    options = parser.parse_args()
    uvicorn.run(
        build(document(options.answer_bytes)),
        host="127.0.0.1",
        port=options.port,
        loop="uvloop",
        http="httptools",
        ws="none",
        lifespan="off",
        log_config=None,
        access_log=False,
        server_header=False,
        timeout_keep_alive=75,
        backlog=2048,
    )


if __name__ == "__main__":
    main()
