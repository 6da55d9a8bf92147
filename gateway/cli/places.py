"""Options that name the directories, the same for all commands that work without a server."""

from pathlib import Path
from typing import Annotated

import typer

from gateway.errors import BadRequestError
from registry import catalog
from registry.catalog import Catalog
from registry.errors import RegistryError

Registry = Annotated[
    Path, typer.Option("-r", "--registry", envvar="DRIFTGATE_REGISTRY", help="The directory.")
]
State = Annotated[
    Path | None,
    typer.Option(
        "--state-dir", envvar="DRIFTGATE_STATE_DIR", help="Default: .driftgate in the registry."
    ),
]
AsJSON = Annotated[bool, typer.Option("--json", help="As JSON.")]

REGISTRY = Path("models")


def state_of(registry: Path, state_dir: Path | None) -> Path:
    """Where the revisions are."""
    return registry / ".driftgate" if state_dir is None else state_dir


def look(registry: Path) -> Catalog:
    """What the registry holds.

    Raises
    ------
    BadRequestError : it cannot be read.
    """
    try:
        return catalog.scan(registry)
    except RegistryError as error:
        raise BadRequestError(f"registry {str(registry)!r}: {error}") from None
