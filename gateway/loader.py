"""A version from its files to a session: copied, compared, looked at, opened, tried out.

What is opened is a private copy whose bytes were hashed while they were copied, so that nobody can
change them in between; the copy is gone once the session holds it. A file that no publish has tried
is opened in a child process first.
"""

import contextlib
import logging
import os
import secrets
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from gateway import admission, golden, memory
from gateway.columns import named
from gateway.config import ServerConfig
from gateway.errors import BadRequestError, VersionRefusedError
from gateway.runtime import Session, Trial
from gateway.telemetry import event
from monitors import MonitorError, Profile
from monitors.loss import LossReference
from registry import catalog, manifest, store, trust
from registry.catalog import VersionFiles
from registry.errors import RegistryError, WriteError

_BYTES_MAX = 16 << 30
_VERDICTS_MAX = 10_000


@dataclass(frozen=True, slots=True)
class Loaded:
    """A version, opened."""

    session: Session
    trial: Trial
    digest: str
    """Of the bytes that were opened."""
    n_bytes: int
    """Memory that it takes."""
    profile: Profile | None
    """Its own reference profile."""
    problem: str
    """What is wrong with that profile; empty when nothing is."""
    labels: LossReference | None = None
    """Its own reference of labels."""
    labels_problem: str = ""
    """What is wrong with that."""


class Opening:
    """One version on its way to a session, which another thread may give up."""

    def __init__(self) -> None:
        self._session: Session | None = None
        self._is_over = False

    def holds(self, session: Session) -> None:
        """Its session, whose cases run now."""
        self._session = session
        if self._is_over:
            session.end()

    def give_up(self) -> None:
        """Nobody waits for it any more: what runs is ended, as far as it can be."""
        self._is_over = True
        if self._session is not None:
            self._session.end()


class Loader:
    """Opens versions, one at a time, for one worker.

    Parameters
    ----------
    scratch : where copies live for a moment, on local disk
    keys : whose signatures are trusted; None: no signature is asked for
    """

    def __init__(
        self, config: ServerConfig, scratch: Path, keys: "trust.Keys | None" = None
    ) -> None:
        self._config = config
        self._scratch = scratch
        self._keys = keys
        self._is_told = False

    def load(self, files: VersionFiles, opening: Opening | None = None) -> Loaded:
        """Open one version; blocks, so call it off the loop.

        Raises
        ------
        VersionRefusedError : it cannot be served, with the reason.
        """
        with self._copy(files) as (copy, digest, model_digest):
            if files.digest is not None and digest != files.digest:
                raise VersionRefusedError(
                    "its files are not those that its manifest lists; publish them as another"
                    " version"
                )
            if self._keys is not None:
                self._ask_for_signature(files)
            if not admission.is_known(files.manifest) and not self._is_known(model_digest):
                admission.admit(copy)
                self._remember(model_digest)
            held = VersionFiles(files.model, files.version, copy, files.manifest)
            before = memory.resident()
            session = Session(held.model_file, self._config.runtime)
            if opening is not None:
                opening.holds(session)
            session.signature = named(session.signature, held.reference_file)
            _check_cases(session, held)
            trial = session.try_out(self._config.batch, self._config.runtime)
            grown = memory.resident() - before
            profile, problem = _profile(held)
            labels, labels_problem = _labels(held)
            n_bytes = max(grown, held.model_file.stat().st_size)
        return Loaded(session, trial, digest, n_bytes, profile, problem, labels, labels_problem)

    def _ask_for_signature(self, files: VersionFiles) -> None:
        """Hold the seal of a version against the keys; the caller has compared its files."""
        assert self._keys is not None  # noqa: S101  asked by load
        try:
            described = trust.verify(
                files.directory, self._keys, model=files.model, version=files.version
            )
        except RegistryError as error:
            raise VersionRefusedError(f"is not trusted: {error}") from None
        if described.digest != files.digest:
            raise VersionRefusedError("is not trusted: its manifest was exchanged meanwhile")

    @contextlib.contextmanager
    def _copy(self, files: VersionFiles) -> Iterator[tuple[Path, str, str]]:
        """A private copy with the digest of all its bytes, and of those that the runtime opens."""
        target = self._scratch / f"{os.getpid()}-{secrets.token_hex(4)}"
        try:
            try:
                target.mkdir(parents=True, mode=0o700)
                listed = catalog.content(files.directory)
                copied = store.private_copy(
                    files.directory, listed, target, bytes_max=_BYTES_MAX, is_durable=False
                )
            except (WriteError, RegistryError, OSError) as error:
                if isinstance(error, RegistryError) and not isinstance(error, WriteError):
                    raise VersionRefusedError(f"cannot be opened: {error}") from None
                if not files.directory.is_dir():
                    raise VersionRefusedError("cannot be opened: its directory is gone") from None
                digests = self._in_place(files)
                yield files.directory, manifest.tree_digest(digests), _model_digest(digests)
                return
            yield target, manifest.tree_digest(copied), _model_digest(copied)
        finally:
            shutil.rmtree(target, ignore_errors=True)

    def _in_place(self, files: VersionFiles) -> dict[str, store.FileDigest]:
        """Where no copy can be written: what is there now, hashed, and opened where it is."""
        if not self._is_told:
            self._is_told = True
            event("no_private_copy", logging.WARNING, reason="the run directory cannot be written")
        try:
            return catalog.digests_of(files)
        except RegistryError as error:
            raise VersionRefusedError(f"cannot be opened: {error}") from None

    # A verdict of this host: files that a child has opened before need no child again.

    def _verdict_file(self, digest: str) -> Path:
        runtime = admission.RUNTIME.replace(" ", "-")
        return self._scratch.parent / "verdicts" / f"{digest.removeprefix('sha256:')}-{runtime}"

    def _is_known(self, digest: str) -> bool:
        return self._verdict_file(digest).is_file()

    def _remember(self, digest: str) -> None:
        file = self._verdict_file(digest)
        with contextlib.suppress(OSError):
            file.parent.mkdir(parents=True, exist_ok=True)
            if sum(1 for _ in file.parent.iterdir()) < _VERDICTS_MAX:
                file.touch()


def sweep(scratch: Path) -> None:
    """Remove copies that processes which are no more have left behind."""
    with contextlib.suppress(OSError):
        for entry in scratch.iterdir():
            pid = entry.name.partition("-")[0]
            if pid.isdecimal() and not Path("/proc", pid).exists():
                shutil.rmtree(entry, ignore_errors=True)


def _check_cases(session: Session, files: VersionFiles) -> None:
    """Warm the session on its own rows, and run its golden cases.

    Raises
    ------
    VersionRefusedError : a case cannot be read, or the model answers otherwise.
    """
    for name in (catalog.WARMUP_FILE, catalog.GOLDEN_FILE):
        try:
            data = (files.directory / name).read_bytes()
        except FileNotFoundError:
            continue
        except OSError:
            raise VersionRefusedError(f"{name} cannot be read") from None
        try:
            cases = golden.read(data, name, session.signature)
        except BadRequestError as error:
            raise VersionRefusedError(str(error)) from None
        golden.run(session, cases, name)


def _model_digest(digests: dict[str, store.FileDigest]) -> str:
    return admission.model_digest(digests)


def _profile(files: VersionFiles) -> tuple[Profile | None, str]:
    try:
        return Profile.from_json(files.reference_file.read_bytes()), ""
    except FileNotFoundError:
        return None, ""
    except OSError:
        return None, "reference.json cannot be read"
    except MonitorError as error:
        return None, f"reference.json: {error}"


def _labels(files: VersionFiles) -> tuple[LossReference | None, str]:
    try:
        return LossReference.from_json(files.labels_file.read_bytes()), ""
    except FileNotFoundError:
        return None, ""
    except OSError:
        return None, "labels.json cannot be read"
    except MonitorError as error:
        return None, f"labels.json: {error}"
