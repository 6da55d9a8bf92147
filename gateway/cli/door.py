"""How commands reach what is in force: the directory itself, or a running server.

Every command that changes it takes the same options, declared here once, and prints the same:
the revision, what is different, and the command that undoes it.
"""

import functools
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer

from gateway.cli import output
from gateway.errors import StartError, of_registry

if TYPE_CHECKING:
    from gateway.outgoing import Connection
    from registry.changes import Change
    from registry.revisions import Revision, Revisions

NOT_CONVERGED = 4
"""Exit code: it is written, and not every live worker has applied it in time."""
T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class Where:
    """What a command works on."""

    registry: Annotated[
        Path, typer.Option("-r", "--registry", envvar="DRIFTGATE_REGISTRY", help="The directory.")
    ] = Path("models")
    state_dir: Annotated[
        Path | None,
        typer.Option(envvar="DRIFTGATE_STATE_DIR", help="Default: .driftgate in the registry."),
    ] = None
    server: Annotated[str | None, typer.Option(help="Go through a running server instead.")] = None
    key: Annotated[
        str | None,
        typer.Option(envvar="DRIFTGATE_KEY", help="Key to show to it, with the scope admin."),
    ] = None
    as_json: Annotated[bool, typer.Option("--json", help="As JSON.")] = False

    @property
    def state_path(self) -> Path:
        """The state directory."""
        return self.state_dir or self.registry / ".driftgate"

    def call(self, method: str, path: str, timeout_s: float = 10.0, **more: Any) -> Any:
        """The answer of the server."""
        from gateway.outgoing import Connection

        assert self.server is not None  # noqa: S101  asked for before
        with Connection(self.server, key=self.key, timeout_s=timeout_s) as connection:
            return connection.call(method, path, **more)

    def read(self, get: "Callable[[Revisions], T]") -> T:
        """What the directory says.

        Raises
        ------
        GatewayError : it cannot be read, or is not there.
        """
        from registry.errors import RegistryError
        from registry.revisions import Revisions

        if not self.registry.is_dir() and not self.state_path.is_dir():
            raise StartError(f"registry {str(self.registry)!r}: no such directory")
        try:
            return get(Revisions(self.state_path))
        except RegistryError as error:
            raise of_registry(error) from None


@dataclass(frozen=True, slots=True, kw_only=True)
class Running:
    """A running server that a command asks: what it tells is nowhere else."""

    server: Annotated[
        str | None, typer.Option(help="Default: $DRIFTGATE_SERVER, else port 8000.")
    ] = None
    key: Annotated[str | None, typer.Option(envvar="DRIFTGATE_KEY", help="Key to show to it.")] = (
        None
    )
    as_json: Annotated[bool, typer.Option("--json", help="As JSON.")] = False

    @contextmanager
    def connected(self) -> "Iterator[Connection]":
        """A connection for several calls."""
        from gateway.outgoing import Connection

        with Connection(self.server or output.server_default(), key=self.key) as connection:
            yield connection

    def call(self, method: str, path: str, **more: Any) -> Any:
        """The answer of the server."""
        with self.connected() as connection:
            return connection.call(method, path, **more)


@dataclass(frozen=True, slots=True, kw_only=True)
class How:
    """How a change is made."""

    message: Annotated[str, typer.Option("-m", "--message", help="Why, for the history.")] = ""
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Only say what would change, and who would move.")
    ] = False
    if_match: Annotated[
        int | None, typer.Option(min=0, help="Only if this revision is in force.")
    ] = None
    wait: Annotated[
        bool, typer.Option("--wait", help="Until all live workers have applied it.")
    ] = False
    timeout: Annotated[
        float, typer.Option(min=0, max=60, help="Seconds to wait at most; then exit 4.")
    ] = 10.0
    force: Annotated[
        bool, typer.Option("--force", help="Also to a version that clients do not fit.")
    ] = False
    take_over: Annotated[
        bool, typer.Option("--take-over", help="Also what a rollout owns; that is over then.")
    ] = False


def takes(*kinds: type) -> Callable[[Callable[..., T]], Callable[..., T]]:
    """Give a command the options of these classes, and the function an instance of each.

    Its parameters of these types are filled in; typer sees the options in their place.
    """

    def decorate(function: Callable[..., T]) -> Callable[..., T]:
        signature = inspect.signature(function)
        wanted = {p.name: p.annotation for p in signature.parameters.values()}
        own = [p for p in signature.parameters.values() if p.annotation not in kinds]
        options = [
            inspect.Parameter(
                entry.name,
                inspect.Parameter.KEYWORD_ONLY,
                default=entry.default,
                annotation=entry.type,
            )
            for kind in kinds
            for entry in fields(kind)
        ]

        @functools.wraps(function)
        def command(**given: Any) -> T:
            for name, kind in wanted.items():
                if kind in kinds:
                    names = [entry.name for entry in fields(kind)]
                    given[name] = kind(**{each: given.pop(each) for each in names})
            return function(**given)

        parameters = [p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in own]
        seen: Any = command  # typer reads these two
        seen.__signature__ = signature.replace(parameters=[*parameters, *options])
        seen.__annotations__ = {p.name: p.annotation for p in (*own, *options)}
        return command

    return decorate


def change(
    where: Where,
    how: How,
    make: "Callable[[Revisions], Change]",
    call: tuple[str, str, object],
    notes: "Callable[[Revision], list[str]] | None" = None,
) -> None:
    """Make a change and say what came of it.

    Parameters
    ----------
    make : the change, for the directory
    call : verb, path and body of the same change, for a server
    notes : what else to say about the revision that was made here; a server says it by itself
    """
    answer = _remote(where, how, *call) if where.server else _local(where, how, make, notes)
    if where.as_json:
        output.print_json(answer)
    else:
        _print(answer)
    if answer.get("applied") is False:
        raise typer.Exit(NOT_CONVERGED)


def _remote(where: Where, how: How, method: str, path: str, body: object) -> dict[str, Any]:
    query: dict[str, str] = {}
    for name in ("dry_run", "force", "take_over"):
        if getattr(how, name):
            query[name] = "true"
    if how.message:
        query["message"] = how.message
    if how.wait:
        query |= {"wait": "applied", "timeout": f"{how.timeout:g}"}
    headers = {"x-driftgate-via": "cli"}
    if how.if_match is not None:
        headers["if-match"] = f'"{how.if_match}"'
    answer: dict[str, Any] = where.call(
        method, path, how.timeout + 10, body=body, query=query, headers=headers
    )
    return answer


def _local(
    where: Where,
    how: How,
    make: "Callable[[Revisions], Change]",
    notes: "Callable[[Revision], list[str]] | None" = None,
) -> dict[str, Any]:
    from registry import changes, workers
    from registry.errors import RegistryError

    def apply(revisions: "Revisions") -> dict[str, Any]:
        try:
            known = changes.OnDisk(where.registry)
        except RegistryError as error:
            raise StartError(f"registry {str(where.registry)!r}: {error}") from None
        applied = changes.apply(
            revisions,
            make(revisions),
            known=known,
            actor=_user(),
            via="cli",
            message=how.message,
            if_match=how.if_match,
            dry_run=how.dry_run,
            force=how.force,
            take_over=how.take_over,
        )
        answer = applied.document(dry_run=how.dry_run)
        if notes is not None and (said := notes(applied.revision)):
            answer["notes"] = said
        if how.wait and not how.dry_run:
            number = applied.revision.number
            behind = workers.wait_applied(where.state_path, number, how.timeout)
            answer |= {
                "applied": not behind,
                "laggards": [f"{beat.name} has {beat.observed} in force" for beat in behind],
            }
        return answer

    return where.read(apply)


def _print(answer: dict[str, Any]) -> None:
    say = typer.echo
    if not answer["changed"]:
        say(f"nothing to change: revision {answer['revision']} says so already")
        return
    would = "would be " if answer["dry_run"] else ""
    say(f"{would}revision {answer['revision']}")
    for line in answer["diff"]:
        say(f"  {line}")
    for model, percent in answer["moved"].items():
        if percent:
            say(f"  {model}: another version answers {percent:g} % of its units")
    if not answer["dry_run"]:
        say(f"undo: {answer['undo']}")
    for note in answer.get("notes", ()):
        say(f"note: {note}")
    if answer.get("applied"):
        say("applied by all workers")
    elif "applied" in answer:
        say("not applied by all workers yet")
        for line in answer["laggards"]:
            say(f"  {line}")


def _user() -> str:
    import getpass

    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a numeric user without a name, as in containers
        import os

        return f"uid:{os.getuid()}"
