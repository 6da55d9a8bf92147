"""Publish: a model file becomes an immutable version, whole or not at all.

Copy beside, open in a child process, run the golden cases, fit or check the profile, describe, then
one rename. Publishing is not deploying: whether traffic moves is written in revisions.
"""

import contextlib
import getpass
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import msgspec

from gateway import __version__, admission
from gateway import golden as cases
from gateway import reference as references
from gateway.admission import Admitted
from gateway.columns import columns_of
from gateway.columns import fit as fit_columns
from gateway.config import RuntimeConfig
from gateway.errors import (
    AliasConflictError,
    BadRequestError,
    StorageError,
    VersionTakenError,
    VersionWithdrawnError,
    nearest,
    shown,
)
from gateway.runtime import Session
from monitors import MonitorError, Profile
from monitors.loss import LossReference
from registry import catalog, changes, manifest, names, store, trust
from registry.catalog import (
    GOLDEN_FILE,
    LABELS_FILE,
    MODEL_FILE,
    REFERENCE_FILE,
    WARMUP_FILE,
    VersionFiles,
)
from registry.errors import ConflictError, RegistryError, WriteError
from registry.manifest import Manifest
from registry.revisions import Revisions
from registry.store import FileDigest, Staging

_SIZE_MAX = 1 << 40
_PROFILE_BYTES_MAX = 64 << 20

Progress = Callable[[str, float], None]
"""Is told what is being done, and the share of it that is done."""


@dataclass(frozen=True, slots=True)
class Published:
    """What came of it."""

    model: str
    version: int
    digest: str
    is_new: bool
    """False when a version with just these files was there already."""
    problems: tuple[str, ...] = ()
    """What works, but perhaps not as meant: columns of the reference that are not watched."""
    revision: int | None = None
    """The revision in which the alias names it, if one was asked for."""
    moved: tuple[str, ...] = ()
    """What that revision changed."""
    undo: str = ""
    """The command that takes the revision back; the version stays."""
    flagged: tuple[str, ...] = ()
    """Operators that may take unbounded time or memory."""


@dataclass(slots=True)
class _Draft:
    """A version on its way."""

    admitted: Admitted
    files: dict[str, FileDigest]
    problems: list[str] = field(default_factory=list)


def publish(
    registry: Path,
    model: str,
    file: Path,
    *,
    version: int | None = None,
    reference: Path | None = None,
    labels: Path | None = None,
    target: str | None = None,
    warmup: Path | None = None,
    golden: Path | None = None,
    lineage: Mapping[str, Any] | None = None,
    tags: Mapping[str, str] | None = None,
    alias: str | None = None,
    state_dir: Path | None = None,
    sign: Path | None = None,
    via: str = "python",
    progress: Progress = lambda _what, _share: None,
) -> Published:
    """Make a version out of a model file.

    Parameters
    ----------
    registry, model : where, and under which name
    file : the ONNX file; files of weights that it names are taken from its own directory
    version : the number to take; else the next one
    reference : a profile (`.json`), or reference data (CSV, NPZ) to make one of
    labels : a reference of labels (`.json`), or labelled data (CSV, NPZ) to make one of
    target : the column of labels of that data; without `labels`, of the reference data
    warmup, golden : runs before it serves, and what must come out (gateway/golden.py)
    lineage : anything JSON can hold; kept as it is
    alias : a name that is to mean this version afterwards, in a revision of its own
    state_dir : where the revisions are; else `.driftgate` in the registry
    sign : PEM file of an Ed25519 private key
    via : what the revision says about the way it came

    Raises
    ------
    BadRequestError : a name, a file or a case is wrong; nothing was published.
    VersionRefusedError : the model cannot be served, with the reason.
    VersionTakenError : another has the number that was named.
    VersionWithdrawnError : just these files were withdrawn.
    StorageError : the registry cannot be written.
    """
    if not names.is_model(model):
        raise BadRequestError(
            f"{shown(model)} is no name of a model: letters, digits, '.', '_', '-'; no '..'"
        )
    if version is not None and names.version(str(version)) is None:
        raise BadRequestError(f"version {version}: must be a positive number")
    try:
        key = None if sign is None else trust.read_private_key(sign)
        is_made = _make(registry)
        store.make_directory(registry / model)
        with Staging(registry / model) as staging:
            draft = _stage(
                staging, file, progress, reference=reference, warmup=warmup, golden=golden,
                labels=labels, target=target,
            )  # fmt: skip
            if is_made:
                draft.problems.append(f"registry {str(registry)!r} was not there: it was made")
            progress("publishing", 0.0)
            described = _describe(model, draft, lineage or {}, tags or {})
            revisions = Revisions(state_dir or registry / ".driftgate")
            if alias is not None:
                _hold(revisions, registry, model, via)
            with _turn(registry / model):
                made = _place(staging, registry / model, described, draft, version, key)
        return made if alias is None else _named(made, revisions, registry, alias, via)
    except WriteError as error:
        raise StorageError(f"not published: {error}") from None
    except RegistryError as error:
        raise BadRequestError(str(error)) from None


def _make(registry: Path) -> bool:
    """Make a registry that is not there, if only its last part is missing: else it is a slip.

    Raises
    ------
    BadRequestError
    """
    if registry.is_dir():
        return False
    if registry.exists():
        raise BadRequestError(f"registry {str(registry)!r}: not a directory")
    if not registry.absolute().parent.is_dir():
        raise BadRequestError(
            f"registry {str(registry)!r}: no such directory, nor the one that it would be in;"
            " make that, or name another with --registry"
        )
    store.make_directory(registry)
    return True


@contextlib.contextmanager
def _turn(model: Path) -> Iterator[None]:
    """Look and take a number while nobody else does, or two could take one each for equal files.

    Where there are no locks numbers are exclusive all the same.
    """
    lease = store.Lease(model / ".publish.lock")
    with contextlib.suppress(WriteError):
        lease.acquire(wait=True)
    try:
        yield
    finally:
        lease.release(remove=True)


def _stage(
    staging: Staging,
    file: Path,
    progress: Progress,
    *,
    reference: Path | None,
    warmup: Path | None,
    golden: Path | None,
    labels: Path | None,
    target: str | None,
) -> _Draft:
    """Copy and look at everything that makes the version."""
    files = _copy_model(staging, file, progress)
    progress("opening", 0.0)
    draft = _Draft(admission.admit(staging.directory), files)
    session = None
    for source, name in ((warmup, WARMUP_FILE), (golden, GOLDEN_FILE)):
        if source is None:
            continue
        session = session or Session(staging.directory / MODEL_FILE, RuntimeConfig())
        data = _read(source, cases.BYTES_MAX)
        progress("running cases", 0.0)
        cases.run(session, cases.read(data, source.name, session.signature), source.name)
        draft.files[name] = staging.write(name, data)
    if reference is not None:
        profile, draft.problems = _profile(
            staging.directory / MODEL_FILE, reference, target, progress
        )
        data = (profile.to_json() + "\n").encode("ascii")
        draft.files[REFERENCE_FILE] = staging.write(REFERENCE_FILE, data)
    if labels is not None or target is not None:
        judged = _labels(staging.directory / MODEL_FILE, labels or reference, target, progress)
        data = (judged.to_json() + "\n").encode("ascii")
        draft.files[LABELS_FILE] = staging.write(LABELS_FILE, data)
    return draft


def _copy_model(staging: Staging, file: Path, progress: Progress) -> dict[str, FileDigest]:
    """The ONNX file, and the files of weights that it names in its own directory."""
    if not file.is_file():
        raise BadRequestError(f"{file.name}: no such file")
    try:
        external = admission.external_files(file)
        sizes = [file.stat().st_size] + [(file.parent / name).stat().st_size for name in external]
    except FileNotFoundError as error:
        raise BadRequestError(f"{Path(error.filename).name}: no such file") from None
    except OSError as error:
        raise BadRequestError(f"{file.name}: cannot be read: {error.strerror}") from None
    if clash := {MODEL_FILE, manifest.FILE, manifest.SEAL_FILE, REFERENCE_FILE, LABELS_FILE} & {
        *external
    }:
        raise BadRequestError(f"{file.name}: its weights are in {min(clash)!r}; rename that file")
    total, done = max(sum(sizes), 1), 0

    def told(n_bytes: int) -> None:
        nonlocal done
        done += n_bytes
        progress("copying", min(done / total, 1.0))

    try:
        copied = {MODEL_FILE: staging.copy(file, MODEL_FILE, bytes_max=_SIZE_MAX, progress=told)}
        copied |= store.private_copy(
            file.parent, external, staging.directory, bytes_max=_SIZE_MAX, progress=told
        )
    except OSError as error:
        raise BadRequestError(f"{file.name}: cannot be read: {error.strerror}") from None
    return copied


def _labels(
    model_file: Path, source: Path | None, target: str | None, progress: Progress
) -> LossReference:
    """A reference of labels that was made before, or one made of labelled data."""
    if source is None:
        raise BadRequestError("target names a column of labels; of which data?")
    if source.suffix == ".json" and target is None:
        try:
            return LossReference.from_json(_read(source, _PROFILE_BYTES_MAX))
        except MonitorError as error:
            raise BadRequestError(f"{source.name}: {error}") from None
    if source.suffix == ".json" or target is None:
        raise BadRequestError(
            f"{source.name}: labelled data is CSV or NPZ, and target names its column of labels"
        )
    columns = references.read(source, lambda share: progress("reading labels", share))
    truth = references.truth_of(columns, target)
    return references.fit_labels(
        columns,
        truth,
        model_file,
        {"origin": "driftgate publish", "data": source.name, "target": target},
        lambda share: progress("running the model on labelled rows", share),
    )


def _profile(
    model_file: Path, source: Path, target: str | None, progress: Progress
) -> tuple[Profile, list[str]]:
    """A profile that was made before, or one made of data by running the model on it."""
    if source.suffix == ".json":
        try:
            profile = Profile.from_json(_read(source, _PROFILE_BYTES_MAX))
        except MonitorError as error:
            raise BadRequestError(f"{source.name}: {error}") from None
    else:
        columns = references.read(source, lambda share: progress("reading reference", share))
        if target is not None:
            columns.pop(target, None)
        profile = references.fit_to_model(
            columns,
            model_file,
            {"origin": "driftgate publish", "data": source.name},
            lambda share: progress("running the model on the reference", share),
        )
    signature = Session(model_file, RuntimeConfig()).signature
    watched, _ = columns_of(signature)
    fitting, problems = fit_columns(profile, watched, signature)
    if not fitting:
        first = next(iter(profile.channels))
        hint = nearest(first, [column.channel for column in watched])
        meant = f"; did you mean {hint!r}?" if hint else ""
        raise BadRequestError(
            f"{source.name}: none of its columns is an input or output of the model,"
            f" {first!r} is not{meant}"
        )
    return profile, problems


def _describe(
    model: str, draft: _Draft, lineage: Mapping[str, Any], tags: Mapping[str, str]
) -> Manifest:
    return Manifest(
        model=model,
        version=0,
        digest=manifest.tree_digest(draft.files),
        files=manifest.entries(draft.files),
        signature=draft.admitted.signature,
        runtime=draft.admitted.runtime,
        verdict=draft.admitted.verdict(admission.model_digest(draft.files)),
        lineage={"published_by": f"driftgate {__version__}", **lineage},
        tags=dict(tags),
        created=datetime.now(UTC).isoformat(timespec="seconds"),
    )


def _place(
    staging: Staging,
    directory: Path,
    described: Manifest,
    draft: _Draft,
    wanted: int | None,
    key: Any,
) -> Published:
    """Find the number and take it, unless a version with just these files is there."""
    while True:
        taken = catalog.numbers(directory)
        for same in taken:
            if not _is_same(VersionFiles(described.model, same, directory / str(same)), described):
                continue
            if catalog.is_withdrawn(directory, same):
                raise VersionWithdrawnError(described.model, same)
            _settle(directory / str(same), same, described, key)
            return _published(described, draft, same, is_new=False)
        number = wanted or max(taken, default=0) + 1
        if number in taken:
            raise VersionTakenError(described.model, number)
        numbered = msgspec.structs.replace(described, version=number)
        data = numbered.to_json()
        if len(data) > manifest.BYTES_MAX:
            raise BadRequestError(f"lineage and tags: more than {manifest.BYTES_MAX} bytes")
        staging.write(manifest.FILE, data)
        if key is not None:
            staging.write(manifest.SEAL_FILE, key.sign(data))
        if staging.publish(directory / str(number)):
            return _published(numbered, draft, number, is_new=True)


def _hold(revisions: Revisions, registry: Path, model: str, via: str) -> None:
    """Let a model that follows its highest version stay where it is: an alias is asked for.

    It would otherwise move to the new version in the moment between two steps.
    """
    state = revisions.head().models.get(model)
    known = changes.OnDisk(registry)
    versions = known.versions(model)
    if versions and (state is None or state.follow):
        _apply(revisions, changes.Promote(model, versions[-1]), known, "held before a publish", via)


def _named(
    made: Published, revisions: Revisions, registry: Path, alias: str, via: str
) -> Published:
    """The alias names the version, in a revision of its own."""
    try:
        applied = _apply(
            revisions,
            changes.Alias(made.model, alias, made.version),
            changes.OnDisk(registry),
            "published",
            via,
        )
    except ConflictError as error:
        raise AliasConflictError(made.model, made.version, alias, str(error)) from None
    except RegistryError as error:
        raise BadRequestError(
            f"{made.model} version {made.version} is published, but alias {shown(alias)} does not"
            f" name it: {error}"
        ) from None
    return replace(
        made,
        revision=applied.revision.number,
        moved=applied.diff or ("nothing to change",),
        undo=applied.undo,
    )


def _apply(
    revisions: Revisions, change: changes.Change, known: changes.Known, message: str, via: str
) -> changes.Applied:
    return changes.apply(
        revisions,
        change,
        known=known,
        actor=getpass.getuser(),
        via=via,
        message=message,
        force=True,
    )


def _is_same(files: VersionFiles, described: Manifest) -> bool:
    """Whether a version that is there has just these files."""
    try:
        found = catalog.read_manifest(files.model, files.version, files.directory)
        if found is not None:
            return found.digest == described.digest
        sizes = {name: (files.directory / name).stat().st_size for name in described.files}
        if catalog.content(files.directory) != sorted(sizes) or any(
            sizes[name] != entry.bytes for name, entry in described.files.items()
        ):
            return False
        return catalog.digest_of(files) == described.digest
    except (RegistryError, OSError):
        return False


def _settle(directory: Path, version: int, described: Manifest, key: Any) -> None:
    """See that a version that is there is on disk, and signed if that is asked for.

    What is signed is what its manifest says, so it must say of these files what was found here.
    """
    found = None if key is None else catalog.read_manifest(described.model, version, directory)
    if found is not None:
        data = found.to_json()
        is_ours = _findings(found) == _findings(described)
        if not is_ours or (directory / manifest.FILE).read_bytes() != data:
            raise BadRequestError(
                f"version {version} has just these files, but its manifest says otherwise of them:"
                " it is not signed"
            )
        store.create_if_absent(directory / manifest.SEAL_FILE, key.sign(data))
        trust.verify(
            directory, trust.Keys((key.public_key(),)), model=described.model, version=version
        )
    # Whoever made it may have died before it was on disk.
    with contextlib.suppress(OSError):
        store.sync_directory(directory.parent)


def _findings(described: Manifest) -> tuple[object, ...]:
    """What a trial load finds the same each time."""
    digest = "" if described.verdict is None else described.verdict.digest
    return described.signature, described.runtime, digest


def _published(described: Manifest, draft: _Draft, version: int, *, is_new: bool) -> Published:
    return Published(
        described.model,
        version,
        described.digest,
        is_new,
        tuple(draft.problems),
        flagged=tuple(draft.admitted.flagged),
    )


def _read(file: Path, bytes_max: int) -> bytes:
    try:
        with file.open("rb") as stream:
            data = stream.read(bytes_max + 1)
    except OSError as error:
        raise BadRequestError(f"{file.name}: cannot be read: {error.strerror}") from None
    if len(data) > bytes_max:
        raise BadRequestError(f"{file.name}: more than {bytes_max} bytes")
    return data
