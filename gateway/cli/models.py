"""`driftgate models`: what a registry directory holds, or what a server made of it."""

from pathlib import Path
from typing import Annotated, Any

import typer

from gateway.cli import output
from gateway.errors import StartError


def models(
    registry: Annotated[
        Path, typer.Option("-r", "--registry", envvar="DRIFTGATE_REGISTRY", help="The directory.")
    ] = Path("models"),
    server: Annotated[str | None, typer.Option(help="Ask a running server instead.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="As JSON.")] = False,
) -> None:
    """List models and versions."""
    if server is not None:
        from gateway.outgoing import call

        found = call(server, "GET", "/admin/models")["models"]
        if as_json:
            output.print_json(found)
        else:
            _print_served(found)
        return
    listed, problems = _scan(registry)
    if as_json:
        output.print_json({"models": listed, "problems": problems})
        return
    shown = output.table("model", "version", "reference", right=["version"])
    for entry in listed:
        shown.add_row(entry["model"], str(entry["version"]), "yes" if entry["reference"] else "no")
    output.console.print(shown)
    for problem in problems:
        output.console.print(f"passed over: {problem}", markup=False)


def _scan(registry: Path) -> tuple[list[dict[str, Any]], list[str]]:
    from registry import catalog
    from registry.errors import RegistryError

    try:
        found = catalog.scan(registry)
    except RegistryError as error:
        raise StartError(f"registry {str(registry)!r}: {error}") from None
    listed = [
        {"model": name, "version": files.version, "reference": files.reference_file.is_file()}
        for name, versions in found.models.items()
        for files in versions
    ]
    return listed, list(found.problems)


def _print_served(models: list[dict[str, Any]]) -> None:
    shown = output.table("model", "version", "state", "runs", "batched", right=["version"])
    for model in models:
        for version in model["versions"]:
            answers = " (answers)" if version["version"] == model["champion"] else ""
            shown.add_row(
                model["name"],
                str(version["version"]),
                version["state"] + answers,
                version.get("runs", ""),
                version.get("batched") or version["reason"] or "",
            )
    output.console.print(shown)
