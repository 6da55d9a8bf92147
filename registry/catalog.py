"""Models and versions of a registry directory: what is there, and what is not as it must be."""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from registry import names
from registry.errors import RegistryError

MODEL_FILE = "model.onnx"
REFERENCE_FILE = "reference.json"


@dataclass(frozen=True, slots=True)
class VersionFiles:
    """Where the files of one version are."""

    model: str
    version: int
    directory: Path

    @property
    def model_file(self) -> Path:
        """The ONNX file."""
        return self.directory / MODEL_FILE

    @property
    def reference_file(self) -> Path:
        """The reference profile; it need not exist."""
        return self.directory / REFERENCE_FILE


@dataclass(frozen=True, slots=True)
class Catalog:
    """One look at the directory."""

    models: Mapping[str, tuple[VersionFiles, ...]]
    """By name; versions ascending by number (10 comes after 9), never empty."""
    problems: tuple[str, ...]
    """What was passed over, and why. Names only, no paths."""


def scan(root: Path) -> Catalog:
    """Look through `<model>/<version>/model.onnx`; what does not fit is a problem, not an end.

    Entries that start with a dot are nobody's business (`.git`, `.driftgate`, an editor's files),
    and neither are plain files beside the models.

    Raises
    ------
    RegistryError : `root` is not a directory that can be read.
    """
    models: dict[str, tuple[VersionFiles, ...]] = {}
    problems: list[str] = []
    for entry in _entries(root):
        if not names.is_model(entry.name):
            problems.append(
                f"{entry.name!r}: not a model name (letters, digits, '.', '_', '-'; no '..')"
            )
            continue
        versions, found = _versions(entry)
        problems.extend(found)
        if versions:
            models[entry.name] = versions
        elif not found:
            problems.append(f"{entry.name!r}: holds no version (a directory named by a number)")
    return Catalog(models, tuple(problems))


def _versions(model: Path) -> tuple[tuple[VersionFiles, ...], list[str]]:
    found: list[VersionFiles] = []
    problems: list[str] = []
    try:
        entries = _entries(model)
    except RegistryError as error:
        return (), [f"{model.name!r}: {error}"]
    for entry in entries:
        number = names.version(entry.name)
        if number is None:
            problems.append(f"{model.name!r}: {entry.name!r} is not a version (1, 2, 3, ...)")
        elif not (entry / MODEL_FILE).is_file():
            problems.append(f"{model.name!r} version {number}: no {MODEL_FILE} in it")
        else:
            found.append(VersionFiles(model.name, number, entry))
    return tuple(sorted(found, key=lambda files: files.version)), problems


def _entries(root: Path) -> list[Path]:
    """The visible subdirectories of `root`, by name."""
    try:
        with os.scandir(root) as entries:
            return sorted(
                Path(entry.path)
                for entry in entries
                if not entry.name.startswith(".") and entry.is_dir()
            )
    except FileNotFoundError:
        raise RegistryError("no such directory") from None
    except NotADirectoryError:
        raise RegistryError("not a directory") from None
    except PermissionError:
        raise RegistryError("not allowed to read it") from None
    except OSError as error:
        raise RegistryError(f"cannot be read: {error.strerror}") from None
