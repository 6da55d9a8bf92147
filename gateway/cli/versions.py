"""Commands about versions that are there: show, lineage, verify, gc, withdraw."""

import getpass
from collections.abc import Iterable
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any
from urllib.parse import quote

import typer
from rich.markup import escape

from gateway.cli import output, places
from gateway.errors import (
    BadRequestError,
    ModelNotFoundError,
    StorageError,
    VersionNotFoundError,
)
from registry import catalog, gc, manifest, names, trust
from registry.catalog import Catalog, VersionFiles
from registry.errors import RegistryError, WriteError
from registry.revisions import EMPTY, Revision, Revisions

_DAY_S = 86_400.0
_Target = Annotated[str, typer.Argument(metavar="MODEL[@VERSION|@ALIAS]")]


def show(
    target: _Target,
    registry: places.Registry = places.REGISTRY,
    state_dir: places.State = None,
    server: Annotated[
        str | None, typer.Option(help="Ask a running server what it made of them.")
    ] = None,
    as_json: places.AsJSON = False,
) -> None:
    """Show a model's versions, or all that is known of one version."""
    if server is not None:
        _show_served(server, target, as_json=as_json)
        return
    found = places.look(registry)
    head = head_of(places.state_of(registry, state_dir))
    model, _, rest = target.partition("@")
    if rest:
        about = _about(found, head, resolve(found, head, target))
        output.print_json(about) if as_json else _print_version(about)
        return
    if model not in found.models:
        raise ModelNotFoundError(model, list(found.models))
    listed = [_about(found, head, files) for files in found.models[model]]
    gone = sorted(version for name, version in found.withdrawn if name == model)
    problems = [text for text in found.problems if text.startswith(f"{model!r}")]
    if as_json:
        output.print_json(
            {"model": model, "versions": listed, "withdrawn": gone, "problems": problems}
        )
        return
    shown = output.table(
        "version", "named", "size", "published", "digest", right=["version", "size"]
    )
    for about in listed:
        shown.add_row(
            str(about["version"]),
            escape(", ".join(about["aliases"])) or "-",
            f"{about['bytes']:,}",
            about["created"] or "copied by hand",
            (about["digest"] or "-")[:19],
        )
    output.console.print(shown)
    for version in gone:
        output.console.print(f"withdrawn: version {version}")
    for problem in problems:
        output.console.print(f"passed over: {problem}", markup=False)


def lineage(
    target: _Target,
    registry: places.Registry = places.REGISTRY,
    state_dir: places.State = None,
    as_json: places.AsJSON = False,
) -> None:
    """Show where a version comes from, and when it was named what."""
    found = places.look(registry)
    revisions = Revisions(places.state_of(registry, state_dir))
    files = resolve(found, head_of(places.state_of(registry, state_dir)), target)
    described = files.manifest
    said = {} if described is None else described.lineage
    moves = list(_moves(revisions.history(), files))
    if as_json:
        output.print_json(
            {
                "model": files.model,
                "version": files.version,
                "digest": files.digest,
                "created": described.created if described else "",
                "lineage": said,
                "tags": described.tags if described else {},
                "moves": moves,
            }
        )
        return
    typer.echo(f"{files.model} version {files.version}  {files.digest or 'no manifest'}")
    for key, value in said.items():
        for line in value if isinstance(value, list) else [value]:
            typer.echo(f"  {key}: {_plain(line)}")
    if described is not None:
        for key, text in described.tags.items():
            typer.echo(f"  tag {key}: {text}")
    for move in moves:
        typer.echo(
            f"  revision {move['revision']}: {', '.join(move['aliases'])}"
            f"  {move['time']} by {move['actor']} {move['message']}".rstrip()
        )


def verify(
    target: Annotated[
        str | None, typer.Argument(metavar="[MODEL[@VERSION]]", help="Nothing: everything.")
    ] = None,
    registry: places.Registry = places.REGISTRY,
    state_dir: places.State = None,
    keys: Annotated[
        Path | None, typer.Option("--trust", help="Public keys: see who signed as well.")
    ] = None,
    as_json: places.AsJSON = False,
) -> None:
    """Read every byte again, and compare it with what was published."""
    found = places.look(registry)
    head = head_of(places.state_of(registry, state_dir))
    chosen = _chosen(found, head, target)
    try:
        trusted = None if keys is None else trust.read_keys(keys)
    except RegistryError as error:
        raise BadRequestError(str(error)) from None
    results: list[dict[str, Any]] = []
    with output.progress("verifying") as bar:
        total = sum(gc.size_of(files.directory) for files in chosen)
        task = bar.add_task("", total=max(total, 1))
        for files in chosen:
            state, reason = _verified(
                files, head, trusted, lambda n_bytes: bar.advance(task, n_bytes)
            )
            results.append(
                {"model": files.model, "version": files.version, "state": state, "reason": reason}
            )
    problems = [text for text in found.problems if target is None] + [
        text for text in Revisions(places.state_of(registry, state_dir)).verify() if target is None
    ]
    wrong = [result for result in results if result["state"] == "wrong"]
    if as_json:
        output.print_json({"versions": results, "problems": problems})
    else:
        for result in results:
            if result["state"] != "ok":
                typer.echo(
                    f"{result['model']} version {result['version']}: {result['state']}:"
                    f" {result['reason']}"
                )
        for problem in problems:
            typer.echo(f"problem: {problem}")
        typer.echo(f"{len(results)} versions read, {len(wrong)} wrong")
    if wrong or problems:
        raise typer.Exit(2)


def gc_command(
    registry: places.Registry = places.REGISTRY,
    state_dir: places.State = None,
    keep: Annotated[int, typer.Option(min=1, help="So many newest versions stay.")] = 3,
    days: Annotated[float, typer.Option(min=0, help="Younger ones stay.")] = 7.0,
    trash_days: Annotated[
        float, typer.Option(min=0, help="After so many days in the trash they are removed.")
    ] = 7.0,
    revisions_back: Annotated[
        int, typer.Option("--revisions", min=1, help="What these many revisions name stays.")
    ] = 100,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what would go.")] = False,
    as_json: places.AsJSON = False,
) -> None:
    """Move versions that nothing refers to into the trash, and empty old trash."""
    found = places.look(registry)
    chain = Revisions(places.state_of(registry, state_dir))
    try:
        now = gc.now_of(registry)
        plan = gc.plan(
            found, chain.history(revisions_back), keep=keep, age_s_min=days * _DAY_S, now=now
        )
        trashed: list[gc.Leaving] = list(plan.leaving)
        removed = 0
        if not dry_run:
            trashed = gc.collect(plan, chain)
            removed = gc.empty(registry, list(found.models), age_s_min=trash_days * _DAY_S, now=now)
    except WriteError as error:
        raise StorageError(str(error)) from None
    if as_json:
        output.print_json(
            {
                "trashed": [
                    {
                        "model": one.files.model,
                        "version": one.files.version,
                        "bytes": one.bytes,
                    }
                    for one in trashed
                ],
                "removed_bytes": removed,
                "dry_run": dry_run,
            }
        )
        return
    for one in trashed:
        typer.echo(f"{one.files.model} version {one.files.version}: {one.bytes:,} bytes")
    verb = "would go" if dry_run else "in the trash"
    typer.echo(
        f"{len(trashed)} versions {verb}, {sum(one.bytes for one in trashed):,} bytes;"
        f" {removed:,} bytes of old trash removed"
    )


def withdraw(
    model: Annotated[str, typer.Argument()],
    version: Annotated[int, typer.Argument(min=1)],
    registry: places.Registry = places.REGISTRY,
    state_dir: places.State = None,
    message: Annotated[str, typer.Option("-m", "--message", help="Why.")] = "",
    force: Annotated[
        bool, typer.Option("--force", help="Also if an alias, a route or a rollout names it.")
    ] = False,
    as_json: places.AsJSON = False,
) -> None:
    """Forbid a version everywhere: no server on this directory serves it again."""
    named = gc.references([head_of(places.state_of(registry, state_dir))])
    by = named.get((model, version))
    if by is not None and not force:
        raise BadRequestError(
            f"{model} version {version} is named by {by}; promote another first, or --force"
        )
    try:
        is_new = gc.withdraw(
            registry,
            model,
            version,
            reason=message,
            by=getpass.getuser(),
            time=datetime.now(UTC).isoformat(timespec="seconds"),
        )
    except WriteError as error:
        raise StorageError(str(error)) from None
    except RegistryError as error:
        raise BadRequestError(str(error)) from None
    if as_json:
        output.print_json({"model": model, "version": version, "is_new": is_new})
        return
    undo = f"rm {registry / model}/{catalog.WITHDRAWN}{version}"
    again = "" if is_new else " before"
    typer.echo(f"{model} version {version} was withdrawn{again}          undo: {undo}")


def _show_served(server: str, target: str, *, as_json: bool) -> None:
    from gateway.outgoing import call

    model, _, rest = target.partition("@")
    path = f"/admin/models/{quote(model, safe='')}"
    about = call(server, "GET", f"{path}/versions/{quote(rest, safe='')}" if rest else path)
    if as_json:
        output.print_json(about)
        return
    for version in about["versions"] if not rest else [about]:
        answers = " (answers)" if about.get("champion") == version["version"] else ""
        reason = f": {version['reason']}" if version["reason"] else ""
        typer.echo(f"{model} version {version['version']}: {version['state']}{answers}{reason}")
        if version.get("runs"):
            typer.echo(f"  runs {version['runs']}, batched {version['batched']}")
    if rest and about["manifest"] is not None:
        described = about["manifest"]
        typer.echo(f"  {described['digest']}")
        for key, value in {**described["lineage"], **described["tags"]}.items():
            typer.echo(f"  {key}: {_plain(value)}")


def resolve(found: Catalog, head: Revision, target: str) -> VersionFiles:
    """The version that `MODEL`, `MODEL@VERSION` or `MODEL@ALIAS` means.

    Raises
    ------
    NotFoundError : there is none.
    """
    model, _, rest = target.partition("@")
    versions = found.models.get(model)
    if versions is None:
        raise ModelNotFoundError(model, list(found.models))
    state = head.models.get(model)
    aliases = {} if state is None else state.aliases
    number = names.version(rest)
    if number is None and (not rest or rest == "champion") and "champion" not in aliases:
        number = versions[-1].version
    if number is None:
        number = aliases.get(rest or "champion")
    files = None if number is None else found.find(model, number)
    if files is None:
        raise VersionNotFoundError(model, rest, [one.version for one in versions])
    return files


def _chosen(found: Catalog, head: Revision, target: str | None) -> list[VersionFiles]:
    if target is None:
        return [files for versions in found.models.values() for files in versions]
    if "@" in target:
        return [resolve(found, head, target)]
    if target not in found.models:
        raise ModelNotFoundError(target, list(found.models))
    return list(found.models[target])


def head_of(state_dir: Path) -> Revision:
    """What is in force.

    Raises
    ------
    BadRequestError : it cannot be read.
    """
    if not state_dir.is_dir():
        return EMPTY
    try:
        return Revisions(state_dir).head()
    except RegistryError as error:
        raise BadRequestError(str(error)) from None


def _verified(
    files: VersionFiles,
    head: Revision,
    trusted: trust.Keys | None,
    progress: Any,
) -> tuple[str, str]:
    """`ok`, `wrong` or `unknown`, and why."""
    try:
        digests = catalog.digests_of(files, progress)
        if trusted is not None:
            trust.verify(files.directory, trusted, model=files.model, version=files.version)
    except RegistryError as error:
        return "wrong", str(error)
    state = head.models.get(files.model)
    stated = {} if state is None else state.digests
    expected = files.digest or stated.get(str(files.version))
    if expected is None:
        return "unknown", "it was copied by hand, and nothing states its digest"
    if manifest.tree_digest(digests) == expected:
        return "ok", ""
    if files.manifest is not None:
        for name, entry in files.manifest.files.items():
            if name in digests and digests[name].sha256 != entry.sha256:
                return "wrong", f"{name!r} is not what was published"
    return "wrong", "its files are not those that were published"


def _about(found: Catalog, head: Revision, files: VersionFiles) -> dict[str, Any]:
    described = files.manifest
    state = head.models.get(files.model)
    aliases = (
        []
        if state is None
        else sorted(alias for alias, version in state.aliases.items() if version == files.version)
    )
    is_followed = (state is None or state.follow) and found.models[files.model][-1] is files
    about: dict[str, Any] = {
        "model": files.model,
        "version": files.version,
        "digest": files.digest,
        "aliases": aliases or (["champion (followed)"] if is_followed else []),
        "is_pinned": state is not None and files.version in state.pins,
        "bytes": gc.size_of(files.directory),
        "created": described.created if described else "",
        "has_reference": files.reference_file.is_file(),
        "is_signed": (files.directory / manifest.SEAL_FILE).is_file(),
    }
    if described is not None:
        about |= _described(described)
    return about


def _described(described: manifest.Manifest) -> dict[str, Any]:
    import msgspec

    plain: dict[str, Any] = msgspec.to_builtins(described)
    return {
        key: plain[key] for key in ("files", "signature", "runtime", "verdict", "lineage", "tags")
    }


def _print_version(about: dict[str, Any]) -> None:
    typer.echo(f"{about['model']} version {about['version']}  {about['digest'] or 'no manifest'}")
    typer.echo(f"  named: {', '.join(about['aliases']) or 'by nothing'}")
    typer.echo(
        f"  signed: {'yes' if about['is_signed'] else 'no'},"
        f" reference: {'yes' if about['has_reference'] else 'no'},"
        f" pinned: {'yes' if about['is_pinned'] else 'no'}"
    )
    for role in ("inputs", "outputs"):
        for tensor in about.get("signature", {}).get(role, []):
            typer.echo(
                f"  {role[:-1]} {tensor['name']}: {tensor['datatype']} {list(tensor['shape'])}"
            )
    for name, entry in about.get("files", {}).items():
        typer.echo(f"  {name}: {entry['bytes']:,} bytes, sha256 {entry['sha256'][:16]}...")
    if verdict := about.get("verdict"):
        typer.echo(
            f"  trial by {verdict['runtime']}: opened in {verdict['load_s']:.3f} s, first run"
            f" {verdict['run_s'] * 1e3:.2f} ms, {verdict['rss_bytes'] / 2**20:.0f} MiB"
        )
    for key, value in {**about.get("lineage", {}), **about.get("tags", {})}.items():
        typer.echo(f"  {key}: {_plain(value)}")


def _moves(history: Iterable[Revision], files: VersionFiles) -> Iterable[dict[str, Any]]:
    """Revisions in which an alias came to name this version, the oldest first."""
    before: set[str] = set()
    for revision in sorted(history, key=lambda one: one.number):
        state = revision.models.get(files.model)
        now = {
            alias
            for alias, version in ({} if state is None else state.aliases).items()
            if version == files.version
        }
        if came := sorted(now - before):
            yield {
                "revision": revision.number,
                "aliases": came,
                "time": revision.time,
                "actor": revision.actor,
                "message": revision.message,
            }
        before = now


def _plain(value: Any) -> str:
    import json

    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
