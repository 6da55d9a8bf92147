"""`driftgate profile`: a reference profile out of data."""

from pathlib import Path
from typing import Annotated

import typer

from gateway.cli import output
from gateway.errors import BadRequestError


def profile(
    data: Annotated[Path, typer.Argument(help="CSV with a header line, or NPZ.")],
    model: Annotated[
        Path | None,
        typer.Option(help="The ONNX file: cast to its datatypes, and profile its outputs too."),
    ] = None,
    out: Annotated[
        Path, typer.Option("-o", "--out", help="Where to write; put it beside model.onnx.")
    ] = Path("reference.json"),
) -> None:
    """Summarise reference data, so that served rows can be compared with it."""
    from gateway import reference

    lineage = {"origin": "driftgate profile", "data": data.name}
    with output.progress("reading") as bar:
        task = bar.add_task("", total=1.0)
        columns = reference.read(data, lambda done: bar.update(task, completed=done))
    if model is None:
        made = reference.fit(columns, lineage)
    else:
        with output.progress("running the model") as bar:
            task = bar.add_task("", total=1.0)
            made = reference.fit_to_model(
                columns, model, lineage, lambda done: bar.update(task, completed=done)
            )
    try:
        out.write_text(made.to_json() + "\n", encoding="utf-8")
    except OSError as error:
        raise BadRequestError(f"{out}: cannot be written ({error.strerror})") from None
    typer.echo(f"{out}: {made.n_rows} rows, {len(made.channels)} channels")
