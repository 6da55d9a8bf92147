"""What there is to point at, and what a document says of one model, as changes see it."""

from collections.abc import Iterable, Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Protocol

import msgspec

from registry import catalog
from registry.catalog import Catalog
from registry.errors import NotThereError
from registry.revisions import ModelState
from registry.routes import CHAMPION
from registry.signature import Signature

Models = Mapping[str, ModelState]


class Known(Protocol):
    """What there is to point at."""

    def models(self) -> Iterable[str]:
        """Names of all models that have a version."""

    def versions(self, model: str) -> Sequence[int]:
        """Versions of a model that may be served, ascending; none for a model that is not there."""

    def digest(self, model: str, version: int) -> str:
        """The digest of a version's files."""

    def signature(self, model: str, version: int) -> Signature | None:
        """What a version takes and gives, where that is known."""

    def served(self, model: str) -> int | None:
        """The version that answers now, where that is known."""


class OnDisk:
    """What a registry directory holds: all there is to know with no server running."""

    def __init__(self, root: Path, found: Catalog | None = None) -> None:
        """Look through the directory, unless it is known what was found there just now.

        Raises
        ------
        RegistryError : it cannot be read.
        """
        self._catalog = catalog.scan(root) if found is None else found

    def models(self) -> Iterable[str]:
        """Names of all models that have a version."""
        return self._catalog.models

    def versions(self, model: str) -> Sequence[int]:
        """Versions of a model, ascending."""
        return tuple(files.version for files in self._catalog.models.get(model, ()))

    def digest(self, model: str, version: int) -> str:
        """As its manifest states; of its bytes, where it has none.

        Raises
        ------
        RegistryError : a file cannot be read.
        """
        files = self._catalog.find(model, version)
        if files is None:
            raise NotThereError(f"model {model!r} has no version {version}")
        return files.digest or catalog.digest_of(files)

    def signature(self, model: str, version: int) -> Signature | None:
        """As its manifest states."""
        files = self._catalog.find(model, version)
        return files.manifest.tensors() if files and files.manifest else None

    def served(self, model: str) -> int | None:  # noqa: ARG002  part of Known
        """A directory does not know."""
        return None


def managed(models: Models, model: str, known: Known) -> ModelState:
    """The state of a model that somebody takes the wheel of: its champion is what is served now.

    Raises
    ------
    NotThereError : there is no such model, or it has no version.
    """
    state = state_of(models, model, known)
    if not state.follow:
        return state
    served = champion(model, state, known)
    if served is None:
        raise NotThereError(f"model {model!r} has no version that could answer")
    return msgspec.structs.replace(state, follow=False, aliases={**state.aliases, CHAMPION: served})


def champion(model: str, state: ModelState, known: Known) -> int | None:
    """The version that answers: the champion; under follow what is served, recorded or highest."""
    recorded = state.aliases.get(CHAMPION)
    if not state.follow:
        return recorded
    there = known.versions(model)
    for version in (known.served(model), recorded):
        if version in there:
            return version
    return there[-1] if there else None


def state_of(models: Models, model: str, known: Known) -> ModelState:
    """The state of a model that is there.

    Raises
    ------
    NotThereError
    """
    if model in models:
        return models[model]
    if not known.versions(model):
        there = sorted({*models, *known.models()})
        raise NotThereError(f"no model {model[:128]!r} here{suggestion(model, there)}")
    return ModelState()


def require(model: str, version: int, known: Known) -> None:
    """Say no where a model has no such version.

    Raises
    ------
    NotThereError
    """
    there = known.versions(model)
    if version not in there:
        raise NotThereError(f"model {model!r} has no version {version}{have(there)}")


def have(versions: Sequence[int]) -> str:
    """The newest of these, for the end of a sentence."""
    return f"; it has: {', '.join(map(str, versions[-10:]))}" if versions else ""


def suggestion(name: str, known: Iterable[str]) -> str:
    """The name that was probably meant, for the end of a sentence."""
    listed = sorted(known)
    if match := get_close_matches(name[:128], listed, n=1):
        return f"; did you mean {match[0]!r}?"
    return f"; there are: {', '.join(listed[:5])}" if listed else "; there are none"
