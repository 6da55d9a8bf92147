"""`/docs`: what is served here, as a page for people.

One template and one style sheet, both from our own origin; the page runs no script, so its
Content-Security-Policy allows none. Every name on it is escaped by the template engine.
"""

import json
import re
import shlex
from collections.abc import Callable, Sequence
from functools import cache
from importlib import resources
from typing import TYPE_CHECKING, Any

from starlette.requests import Request
from starlette.responses import Response

from gateway import __version__, errors
from gateway.endpoints.openapi import Latest, example, has_example
from gateway.endpoints.route import Endpoint, query
from gateway.prediction import DataPlane
from gateway.router import Model
from registry.signature import Signature, TensorSpec

if TYPE_CHECKING:
    import jinja2

_MODELS_MAX = 100
"""Models shown in full on one page."""
_HOST = re.compile(r"[A-Za-z0-9.\-]{1,255}(:[0-9]{1,5})?|\[[0-9A-Fa-f:.]{2,45}\](:[0-9]{1,5})?")
_HEADERS = {
    "content-security-policy": "default-src 'none'; style-src 'self'; base-uri 'none';"
    " form-action 'none'; frame-ancestors 'none'",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cache-control": "no-store",
}
_SCOPES = {
    "predict": "predictions, and what there is to predict with",
    "monitor": "what the monitors see",
    "admin": "changes the server or tells its inside; this machine's programs only",
    "open": "health; nobody has to show a key",
}


def endpoints(plane: DataPlane, declared: Callable[[], Sequence[Endpoint]]) -> list[Endpoint]:
    """The page and its style; `declared` gives all endpoints of the server, these too."""
    latest = Latest()

    async def page(request: Request) -> Response:
        query(request)
        base, table = _base(plane, request), plane.table
        content = await latest.get(
            table, lambda: render(base, table.models.values(), declared()), base
        )
        return Response(content, media_type="text/html; charset=utf-8", headers=_HEADERS)

    async def style(request: Request) -> Response:
        query(request)
        return Response(_file("docs.css"), media_type="text/css; charset=utf-8", headers=_HEADERS)

    return [
        Endpoint("GET", "/docs", "predict", page,
                 "Models with a command to try, paths and errors, as a page.", answer="Page"),
        Endpoint("GET", "/docs/style.css", "open", style, "Its style.", answer="Style"),
    ]  # fmt: skip


def render(base: str, models: Any, declared: Sequence[Endpoint]) -> str:
    """The whole page.

    Parameters
    ----------
    base : address of the server as the reader has it, for the commands
    models : every `Model` of the table
    """
    listed = sorted(models, key=lambda model: model.name)
    by_scope = {
        scope: {"about": about, "endpoints": [e for e in declared if e.scope == scope]}
        for scope, about in _SCOPES.items()
    }
    return _template().render(
        release=__version__,
        base=base,
        models=[_about(model, base) for model in listed[:_MODELS_MAX]],
        more=[model.name for model in listed[_MODELS_MAX:]],
        scopes=by_scope,
        errors=sorted({(error.status, error.code, _sentence(error)) for error in errors.ALL}),
    )


def command(base: str, model: str, signature: Signature) -> str:
    """A command line that gets a prediction, for a shell to run as it stands."""
    inputs = ",\n    ".join(json.dumps(tensor) for tensor in example(signature)["inputs"])
    body = f'{{"inputs": [\n    {inputs}\n  ]}}'
    return (
        f"curl -s {shlex.quote(f'{base}/v2/models/{model}/infer')} \\\n"
        f"  -H 'content-type: application/json' \\\n  -d {shlex.quote(body)}"
    )


def _about(model: Model, base: str) -> dict[str, Any]:
    champion = model.champion
    about: dict[str, Any] = {
        "name": model.name,
        "versions": model.versions,
        "refused": sorted(model.refused.items()),
        "version": None,
    }
    if champion is not None:
        signature = champion.signature
        about |= {
            "version": champion.version,
            "inputs": [_tensor(spec) for spec in signature.inputs],
            "outputs": [_tensor(spec) for spec in signature.outputs],
            "command": command(base, model.name, signature) if has_example(signature) else None,
        }
    return about


def _tensor(spec: TensorSpec) -> dict[str, str]:
    axes = ["any" if size < 0 else str(size) for size in spec.shape]
    shape = " × ".join(axes) or "a single value"  # noqa: RUF001  the sign people know for it
    return {"name": spec.name, "datatype": spec.datatype, "shape": shape}


def _sentence(error: type[errors.GatewayError]) -> str:
    return (error.__doc__ or "").split("\n")[0].rstrip(".")


def _base(plane: DataPlane, request: Request) -> str:
    """The server's address as the reader's browser has it; what is odd is not repeated."""
    scheme = "https" if request.scope["scheme"] == "https" else "http"
    host = request.headers.get("host", "")
    if not _HOST.fullmatch(host):
        host = f"{plane.config.host}:{plane.config.port}"
    return f"{scheme}://{host}"


@cache
def _template() -> "jinja2.Template":
    # Here, because a server that nobody reads the page of need not wait for the engine.
    import jinja2  # noqa: PLC0415

    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    return environment.from_string(_file("docs.html"))


@cache
def _file(name: str) -> str:
    return resources.files(__name__).joinpath(name).read_text(encoding="utf-8")
