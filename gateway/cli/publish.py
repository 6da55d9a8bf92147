"""`driftgate publish`: a model file becomes a version."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from gateway.cli import output, places
from gateway.errors import BadRequestError


def publish(  # noqa: PLR0917  typer reads options from the parameters
    model: Annotated[str, typer.Argument(help="Name that clients call.")],
    file: Annotated[Path, typer.Argument(help="The ONNX file; its weights lie beside it.")],
    registry: places.Registry = places.REGISTRY,
    state_dir: places.State = None,
    reference: Annotated[
        Path | None,
        typer.Option(
            help="Training data (CSV, NPZ), or a profile of it (JSON), to watch drift by."
        ),
    ] = None,
    labels: Annotated[
        Path | None,
        typer.Option(
            help="Labelled data (CSV, NPZ) that the model was not trained on, or a reference of"
            " labels (JSON): what later labels are compared with."
        ),
    ] = None,
    target: Annotated[
        str | None,
        typer.Option(help="The column of labels there; without --labels, in --reference."),
    ] = None,
    warmup: Annotated[Path | None, typer.Option(help="Runs before it serves: JSON lines.")] = None,
    golden: Annotated[
        Path | None, typer.Option(help="Runs whose outputs must be as given: JSON lines.")
    ] = None,
    version: Annotated[int | None, typer.Option(help="A number; else the next one.")] = None,
    lineage: Annotated[
        list[str] | None,
        typer.Option(metavar="KEY=VALUE", help="Where it comes from; may be given several times."),
    ] = None,
    tag: Annotated[
        list[str] | None, typer.Option(metavar="KEY=VALUE", help="A label; several times.")
    ] = None,
    alias: Annotated[
        str | None, typer.Option(help="Let this alias name the version afterwards.")
    ] = None,
    sign: Annotated[
        Path | None, typer.Option(help="Private key (Ed25519, PEM) to sign it with.")
    ] = None,
    as_json: places.AsJSON = False,
) -> None:
    """Make a version out of a model file; traffic stays where it is."""
    from gateway import publisher

    with output.progress("{task.description}") as bar:
        task = bar.add_task("copying", total=1.0)
        made = publisher.publish(
            registry,
            model,
            file,
            version=version,
            reference=reference,
            labels=labels,
            target=target,
            warmup=warmup,
            golden=golden,
            lineage=_pairs("--lineage", lineage or [], is_json=True),
            tags=_pairs("--tag", tag or [], is_json=False),
            alias=alias,
            state_dir=places.state_of(registry, state_dir),
            sign=sign,
            via="cli",
            progress=lambda what, share: bar.update(task, description=what, completed=share),
        )
    if as_json:
        output.print_json(
            {
                "model": made.model,
                "version": made.version,
                "digest": made.digest,
                "is_new": made.is_new,
                "problems": list(made.problems),
                "flagged": list(made.flagged),
                "revision": made.revision,
                "diff": list(made.moved),
                "undo": made.undo,
            }
        )
        return
    known = "" if made.is_new else " (these files were there already)"
    typer.echo(f"{made.model} version {made.version}{known}  {made.digest}")
    for problem in made.problems:
        typer.echo(f"note: {problem}", err=True)
    if made.flagged:
        typer.echo(
            f"note: {', '.join(made.flagged)}: may take far more time or memory than its input"
            " suggests",
            err=True,
        )
    if made.revision is not None:
        undo = f"          undo: {made.undo}" if made.undo else ""
        typer.echo(f"revision {made.revision}: {'; '.join(made.moved)}{undo}")


def _pairs(option: str, given: Sequence[str], *, is_json: bool) -> dict[str, Any]:
    """`KEY=VALUE` as an object; a key that is given again becomes a list."""
    found: dict[str, Any] = {}
    for text in given:
        key, separator, value = text.partition("=")
        if not separator or not key:
            raise BadRequestError(f"{option} {text!r}: must be KEY=VALUE")
        meant: Any = value
        if is_json:
            try:
                meant = json.loads(value)
            except ValueError:
                meant = value
        if key in found:
            if not is_json:
                raise BadRequestError(f"{option} {key!r}: is given twice")
            before = found[key]
            found[key] = [*before, meant] if isinstance(before, list) else [before, meant]
        else:
            found[key] = meant
    return found
