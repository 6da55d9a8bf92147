"""What is in force, and the one door to change it: aliases, routes, revisions, over HTTP.

Everything that waits for the disk happens on a thread. A change is made by `registry.changes`, as
it is by a command that works on the directory itself.
"""

import asyncio
import threading
import time
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import msgspec
import orjson
from starlette.requests import Request
from starlette.responses import Response

from gateway.config import ServerConfig
from gateway.endpoints.route import Endpoint, JSONAnswer, body_bytes, caller_of, json_object, query
from gateway.errors import (
    BadRequestError,
    ChangeRefusedError,
    NotFoundError,
    VersionNotFoundError,
    of_registry,
    shown,
)
from gateway.prediction import DataPlane
from gateway.telemetry import event
from registry import changes, names, routes, workers
from registry.changes import Applied, Change
from registry.errors import RegistryError
from registry.revisions import ModelState, Revision, Revisions
from registry.signature import Signature
from registry.workers import Heartbeat

T = TypeVar("T")
_CHANGE_QUERY = (
    "dry_run", "wait", "timeout", "force", "take_over", "message",
)  # fmt: skip
_WAIT_S, _WAIT_S_MAX = 10.0, 60.0
_POLL_S = 0.05
_LIMIT, _LIMIT_MAX = 50, 1000
_ROUTE_BYTES_MAX = 1024 * 1024


class Known(changes.OnDisk):
    """The directory, and what this worker knows better: what answers, and signatures it opened."""

    def __init__(self, root: Path, plane: DataPlane) -> None:
        super().__init__(root)
        self._table = plane.table

    def signature(self, model: str, version: int) -> Signature | None:
        """Of a version that is open, else as its manifest states."""
        found = self._table.models.get(model)
        variant = found.variants.get(version) if found else None
        return variant.signature if variant else super().signature(model, version)

    def served(self, model: str) -> int | None:
        """The champion in the table."""
        found = self._table.models.get(model)
        return found.champion.version if found and found.champion else None


class Door:
    """Reads and changes what is in force, one after the other, each on a thread."""

    def __init__(self, config: ServerConfig, plane: DataPlane) -> None:
        self.state_path = config.state_path
        self._registry = Path(config.registry)
        self._plane = plane
        self._revisions = Revisions(self.state_path)
        self._turn = threading.Lock()

    async def read(self, get: Callable[[Revisions], T]) -> T:
        """What `get` reads.

        Raises
        ------
        GatewayError : it cannot be read, or is not there.
        """
        return await asyncio.to_thread(self._guarded, lambda: get(self._revisions))

    async def change(self, make: Callable[[Revisions], Change], **how: Any) -> Applied:
        """What came of the change that `make` gives; `how` as for `changes.apply`.

        Raises
        ------
        GatewayError : the registry's reason.
        """

        def apply() -> Applied:
            known = Known(self._registry, self._plane)
            return changes.apply(self._revisions, make(self._revisions), known=known, **how)

        applied = await asyncio.to_thread(self._guarded, apply)
        if applied.is_changed and not how["dry_run"]:
            made = applied.revision
            event("revision_written", revision=made.number, actor=made.actor, via=made.via)
        return applied

    async def laggards(
        self,
        revision: int,
        timeout_s: float,
        is_done: Callable[[Heartbeat], bool] = lambda _: True,
    ) -> tuple[bool, list[str]]:
        """Whether all live workers have a revision in force, and who has not, with a reason.

        Parameters
        ----------
        is_done : what a worker must say besides
        """
        watch, until = workers.Watch(self.state_path), time.monotonic() + timeout_s
        while True:
            beats = await asyncio.to_thread(watch.look)
            behind = [
                beat for beat in beats.values() if beat.observed < revision or not is_done(beat)
            ]
            if beats and not behind:
                return True, []
            if time.monotonic() >= until or any(
                beat.rejected and beat.rejected.revision >= revision for beat in behind
            ):
                return False, [_lagging(beat) for beat in behind]
            await asyncio.sleep(_POLL_S)

    def _guarded(self, do: Callable[[], T]) -> T:
        with self._turn:
            try:
                return do()
            except RegistryError as error:
                raise of_registry(error) from None


class Handlers:
    """What each path does."""

    def __init__(self, plane: DataPlane, door: Door) -> None:
        self._plane = plane
        self.door = door

    async def state(self, request: Request) -> Response:
        """Everything in force, and who has applied it."""
        query(request)
        head = await self.door.read(lambda revisions: revisions.head())
        beats = await asyncio.to_thread(workers.read, self.door.state_path)
        return _tagged(head.number, {
            "revision": head.number,
            "models": {
                name: _about(self._plane, name, head.models.get(name))
                for name in sorted({*head.models, *self._plane.table.models})
            },
            "workers": [msgspec.to_builtins(beat) for beat in beats.values()],
        })  # fmt: skip

    async def list_all(self, request: Request) -> Response:
        """The newest revisions."""
        given = query(request, "limit", "model")
        limit = _integer(given.get("limit", str(_LIMIT)), "limit", 1, _LIMIT_MAX)
        entries = await self.door.read(lambda found: changes.log(found, limit, given.get("model")))
        problems = await self.door.read(lambda found: found.problems)
        return JSONAnswer({
            "revisions": [_entry(revision, diff) for revision, diff in entries],
            "problems": list(problems),
        })  # fmt: skip

    async def one(self, request: Request) -> Response:
        """One revision, and a difference."""
        given = query(request, "against")
        number = _integer(request.path_params["revision"], "revision", 0)
        against = given.get("against")
        base = None if against is None else _integer(against, "against", 0)

        def get(revisions: Revisions) -> tuple[Revision, Revision]:
            found = revisions.get(number)
            return found, revisions.get(found.parent if base is None else base)

        revision, before = await self.door.read(get)
        diff = changes.differences(before.models, revision.models)
        return JSONAnswer({**msgspec.to_builtins(revision), "diff": diff})

    async def restore(self, request: Request) -> Response:
        """Old content as a new revision."""
        number = _integer(request.path_params["revision"], "revision", 0)
        given = await _body(request, model=str)
        model = given.get("model")
        return await self.changed(
            request, given, lambda found: changes.Restore(found.get(number), model)
        )

    def versioned(
        self, kind: Callable[[str, int], Change]
    ) -> Callable[[Request], Awaitable[Response]]:
        """A change that names a version."""

        async def answer(request: Request) -> Response:
            given, model = await _body(request, version=int), request.path_params["model"]
            version = _version(model, given)
            return await self.changed(request, given, lambda _: kind(model, version))

        return answer

    def plain(self, kind: Callable[[str], Change]) -> Callable[[Request], Awaitable[Response]]:
        """A change of a model that needs no more."""

        async def answer(request: Request) -> Response:
            given, model = await _body(request), request.path_params["model"]
            return await self.changed(request, given, lambda _: kind(model))

        return answer

    async def put_alias(self, request: Request) -> Response:
        """A name for a version."""
        given, model = await _body(request, version=int), request.path_params["model"]
        alias, version = request.path_params["alias"], _version(model, given)
        return await self.changed(request, given, lambda _: changes.Alias(model, alias, version))

    async def delete_alias(self, request: Request) -> Response:
        """A name less."""
        model, alias = request.path_params["model"], request.path_params["alias"]
        return await self.changed(request, {}, lambda _: changes.DeleteAlias(model, alias))

    async def get_monitor(self, request: Request) -> Response:
        """What is said about the monitors of a model."""
        query(request)
        model = request.path_params["model"]
        head = await self.door.read(lambda revisions: revisions.head())
        if model not in head.models:
            self._plane.table.model(model)
        state = head.models.get(model)
        return _tagged(head.number, (state.monitor if state else None) or {})

    async def patch_monitor(self, request: Request) -> Response:
        """Settings over those that there are."""
        patch, model = await json_object(request), request.path_params["model"]
        return await self.changed(request, {}, lambda _: changes.AlterMonitor(model, patch))

    async def get_routes(self, request: Request) -> Response:
        """Routes of all models that have one."""
        query(request)
        head = await self.door.read(lambda revisions: revisions.head())
        return _tagged(head.number, {
            name: routes.document(state.route)
            for name, state in sorted(head.models.items())
            if state.route is not None
        })  # fmt: skip

    async def put_routes(self, request: Request) -> Response:
        """Several routes at once."""
        document = await _route_body(request)
        try:
            parsed = routes.parse(document)  # type: ignore[arg-type]  # it says what it is, if none
        except routes.RouteError as error:
            raise ChangeRefusedError(str(error)) from None
        return await self.changed(request, {}, lambda _: changes.PutRoutes(parsed))

    async def get_route(self, request: Request) -> Response:
        """The route of one model."""
        query(request)
        model = request.path_params["model"]
        head = await self.door.read(lambda revisions: revisions.head())
        route = head.models.get(model, ModelState()).route
        if route is None:
            raise NotFoundError(f"model {shown(model)} has no route: its champion answers")
        return _tagged(head.number, routes.document(route))

    async def put_route(self, request: Request) -> Response:
        """A new route of one model."""
        model = request.path_params["model"]
        document = await _route_body(request)
        try:
            route = routes.parse_one(model, document)
        except routes.RouteError as error:
            raise ChangeRefusedError(str(error)) from None
        return await self.changed(request, {}, lambda _: changes.PutRoute(model, route))

    async def changed(
        self,
        request: Request,
        body: dict[str, Any],
        make: Callable[[Revisions], Change],
        notes: Callable[[Revision], list[str]] | None = None,
    ) -> Response:
        """Make a change as query, headers and body say, and wait for it if that is asked for."""
        given = query(request, *_CHANGE_QUERY)
        if given.get("wait", "applied") != "applied":
            raise BadRequestError(f"wait = {shown(given['wait'])}: must be applied")
        timeout_s = _seconds(given.get("timeout", str(_WAIT_S)))
        dry_run = _flag(given, "dry_run")
        applied = await self.door.change(
            make,
            actor=caller_of(request).name,
            via=_via(request),
            message=body.get("message", given.get("message", "")),
            if_match=_if_match(request),
            dry_run=dry_run,
            force=body.get("force", False) or _flag(given, "force"),
            take_over=body.get("take_over", False) or _flag(given, "take_over"),
        )
        answer = applied.document(dry_run=dry_run)
        if notes is not None and (said := await asyncio.to_thread(notes, applied.revision)):
            answer["notes"] = said
        status = 200
        if "wait" in given and not dry_run:
            is_applied, behind = await self.door.laggards(applied.revision.number, timeout_s)
            answer |= {"applied": is_applied, "laggards": behind}
            status = 200 if is_applied else 202
        if dry_run:
            return JSONAnswer(answer)
        return _tagged(applied.revision.number, answer, status)


def endpoints(plane: DataPlane, door: Door) -> list[Endpoint]:
    """What is in force, its history, and every change of it."""
    h = Handlers(plane, door)
    model = "/admin/models/{model}"
    alias, route = model + "/aliases/{alias}", "/admin/routes/{model}"
    admin: Any = declared
    return [
        Endpoint("GET", "/admin/state", "admin", h.state,
                 "What is in force, and which worker has applied it.", answer="State"),
        Endpoint("GET", "/admin/revisions", "admin", h.list_all,
                 "The newest revisions, with what each changed.", query=("limit", "model"),
                 answer="Revisions"),
        Endpoint("GET", "/admin/revisions/{revision}", "admin", h.one,
                 "One revision, and how it differs from its parent or another.",
                 query=("against",), answer="Revision"),
        admin("POST", "/admin/revisions/{revision}/restore", h.restore,
              "Put in force what an old revision said.", "RestoreRequest"),
        admin("PUT", alias, h.put_alias, "Name a version.", "VersionRequest"),
        admin("DELETE", alias, h.delete_alias, "Give up a name."),
        admin("POST", model + "/promote", h.versioned(changes.Promote),
              "Make a version the champion; the one before is kept as previous.",
              "VersionRequest"),
        admin("POST", model + "/rollback", h.plain(changes.Rollback),
              "Make the previous champion answer again.", "ChangeRequest"),
        admin("POST", model + "/follow", h.plain(changes.Follow),
              "Let the champion follow the highest version.", "ChangeRequest"),
        admin("POST", model + "/pin", h.versioned(changes.Pin),
              "Keep a version in memory and on disk.", "VersionRequest"),
        admin("POST", model + "/unpin", h.versioned(changes.Unpin),
              "Let a version be evicted and removed again.", "VersionRequest"),
        Endpoint("GET", model + "/monitor", "admin", h.get_monitor,
                 "What is said about the monitors of a model.", answer="Monitor"),
        admin("PATCH", model + "/monitor", h.patch_monitor,
              "Set what the monitors of a model do; null takes a setting away.", "Monitor"),
        admin("DELETE", model + "/monitor", h.plain(changes.DeleteMonitor),
              "Let the monitors of a model be as the servers are set."),
        Endpoint("GET", "/admin/routes", "admin", h.get_routes, "All routes.", answer="Routes"),
        admin("PUT", "/admin/routes", h.put_routes,
              "Split the traffic of several models, in one revision.", "Routes"),
        Endpoint("GET", route, "admin", h.get_route, "The route of a model.", answer="Route"),
        admin("PUT", route, h.put_route, "Split the traffic of a model.", "Route"),
        admin("DELETE", route, h.plain(changes.DeleteRoute),
              "Let the champion answer everything."),
    ]  # fmt: skip


def declared(
    method: Any,
    path: str,
    handler: Callable[[Request], Awaitable[Response]],
    summary: str,
    body: str | None = None,
) -> Endpoint:
    """A change: all take the same query and `If-Match`, and answer alike."""
    return Endpoint(
        method, path, "admin", handler, summary,
        query=_CHANGE_QUERY, headers=("if-match",), body=body, answer="Changed",
    )  # fmt: skip


def _about(plane: DataPlane, name: str, state: ModelState | None) -> dict[str, Any]:
    """What is in force for one model, and what answers in this worker."""
    model = plane.table.models.get(name)
    said: dict[str, Any] = msgspec.to_builtins(state or ModelState())
    return {
        "follow": (state or ModelState()).follow,
        **said,
        "versions": list(model.versions) if model else [],
        "served": model.champion.version if model and model.champion else None,
    }


def _entry(revision: Revision, diff: Sequence[str]) -> dict[str, Any]:
    return {
        "revision": revision.number,
        "time": revision.time,
        "actor": revision.actor,
        "via": revision.via,
        "message": revision.message,
        "diff": list(diff),
    }


def _lagging(beat: workers.Heartbeat) -> str:
    why = f"; it refused {beat.rejected.revision}: {beat.rejected.reason}" if beat.rejected else ""
    return f"{beat.name} has {beat.observed} in force{why}"


def _tagged(number: int, value: Any, status: int = 200) -> Response:
    """An answer with the revision it is of, for `If-Match`."""
    return JSONAnswer(value, status_code=status, headers={"etag": f'"{number}"'})


def _if_match(request: Request) -> int | None:
    text = request.headers.get("if-match", "").strip()
    if text in {"", "*"}:
        return None
    number = text.strip('"')
    if number != "0" and names.version(number) is None:
        raise BadRequestError(f'If-Match = {shown(text)}: must be a revision, such as "42"')
    return int(number)


def _via(request: Request) -> str:
    """By which of our own ways a call came; it decides nothing."""
    said = request.headers.get("x-driftgate-via", "")
    return said if said in {"cli", "python"} else "http"


async def _body(request: Request, **fields: type) -> dict[str, Any]:
    """A JSON object with these fields at most, and those of every change."""
    known = fields | {"message": str, "force": bool, "take_over": bool}
    given = await json_object(request)
    for name, value in given.items():
        if name not in known:
            raise BadRequestError(f"no field {shown(name)} here; there are: {', '.join(known)}")
        if type(value) is not known[name] and (value is not None or name != "model"):
            kind = {str: "a text", int: "a whole number", bool: "true or false"}[known[name]]
            raise BadRequestError(f"{name!r} must be {kind}")
    return given


def _version(model: str, given: dict[str, Any]) -> int:
    if "version" not in given:
        raise BadRequestError("'version' is missing")
    version: int = given["version"]
    if names.version(str(version)) is None:
        raise VersionNotFoundError(model, str(version), ())
    return version


async def _route_body(request: Request) -> object:
    """A route document, as JSON or as YAML."""
    body = await body_bytes(request, _ROUTE_BYTES_MAX)
    try:
        return orjson.loads(body)
    except orjson.JSONDecodeError:
        pass
    try:
        return routes.read_text(body)
    except routes.RouteError as error:
        raise ChangeRefusedError(f"the body is neither JSON nor YAML: {error}") from None


def _integer(text: str, name: str, low: int, high: int = 10**18) -> int:
    number = 0 if text == "0" else names.version(text)
    if number is None or not low <= number <= high:
        raise BadRequestError(f"{name} = {shown(text)}: must be a whole number from {low}")
    return number


def _flag(given: dict[str, str], name: str) -> bool:
    text = given.get(name, "false")
    if text not in {"true", "false"}:
        raise BadRequestError(f"{name} = {shown(text)}: must be true or false")
    return text == "true"


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = -1.0
    if not 0 <= seconds <= _WAIT_S_MAX:
        raise BadRequestError(f"timeout = {shown(text)}: must be seconds, at most {_WAIT_S_MAX:g}")
    return seconds
