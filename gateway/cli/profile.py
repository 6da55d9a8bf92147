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
    ordered: Annotated[
        bool, typer.Option(help="The rows are in the order of time: learn how they follow.")
    ] = False,
    time: Annotated[
        str | None, typer.Option(help="The column of times: learn hours of day and week, too.")
    ] = None,
    segment: Annotated[
        str | None, typer.Option(help="A column whose values are also watched by themselves.")
    ] = None,
    target: Annotated[
        str | None,
        typer.Option(
            help="A column of labels, of rows that the model was not trained on: what later labels"
            " are compared with, written to labels.json beside the profile. Needs --model."
        ),
    ] = None,
    positive: Annotated[
        str | None, typer.Option(help="The label that is class 1, where it is not 1.")
    ] = None,
    out: Annotated[
        Path, typer.Option("-o", "--out", help="Where to write; put it beside model.onnx.")
    ] = Path("reference.json"),
) -> None:
    """Summarise reference data, so that served rows can be compared with it."""
    from gateway import reference

    if target is not None and model is None:
        raise BadRequestError("--target needs --model: labels are compared with its answers")
    lineage = {"origin": "driftgate profile", "data": data.name}
    with output.progress("reading") as bar:
        task = bar.add_task("", total=1.0)
        columns = reference.read(data, lambda done: bar.update(task, completed=done))
    truth = None if target is None else reference.truth_of(columns, target)
    times = None if time is None else reference.times_of(columns, time)
    order = reference.Order(is_ordered=ordered, times=times, segments=segment)
    with output.progress("profiling" if model is None else "running the model") as bar:
        task = bar.add_task("", total=1.0)

        def progress(done: float) -> None:
            bar.update(task, completed=done)

        if model is None:
            made = reference.fit(columns, lineage, progress, order=order)
        else:
            made = reference.fit_to_model(columns, model, lineage, progress, order=order)
    _write(out, made.to_json())
    typer.echo(f"{out}: {made.n_rows} rows, {len(made.channels)} channels")
    if truth is None or model is None:
        return
    if times is not None:
        order_ = times.argsort(kind="stable")
        columns = {name: values[order_] for name, values in columns.items()}
        truth = truth[order_]
    labels = reference.fit_labels(
        columns,
        truth,
        model,
        {**lineage, "target": target},
        declared=None if positive is None else {"positive": _value(positive)},
        is_ordered=ordered or times is not None,
    )
    beside = out.with_name("labels.json")
    _write(beside, labels.to_json())
    typer.echo(f"{beside}: {labels.n_rows} labelled rows, {labels.task}")


def _write(out: Path, text: str) -> None:
    try:
        out.write_text(text + "\n", encoding="utf-8")
    except OSError as error:
        raise BadRequestError(f"{out}: cannot be written ({error.strerror})") from None


def _value(text: str) -> float | str:
    """A label as it was typed."""
    try:
        return float(text)
    except ValueError:
        return text
