"""The reference profiles of the demo's models, made from the vendored sample and kept beside it.

Run  python -m gateway.demo.profiles   to write both files again, with driftgate's own dependencies
"""

from pathlib import Path

import numpy as np

from gateway import reference
from gateway.demo import sample
from monitors import Profile


def fit(name: str, folder: Path = sample.SAMPLE_PATH.parent) -> Profile:
    """Summarise the sample's rows of a model's months, and what the model says to them."""
    rows = sample.load(folder / sample.SAMPLE_PATH.name)
    chosen = np.isin(rows.month, sample.TRAINING_MONTHS[name])
    return reference.fit_to_model(
        {column: values[chosen] for column, values in rows.columns.items()},
        folder / sample.model_path(name).name,
        {"data": "flights.npz", "months": list(sample.TRAINING_MONTHS[name])},
        order=reference.Order(is_ordered=True),
    )


def write(folder: Path = sample.SAMPLE_PATH.parent) -> list[Path]:
    """Write the profiles of both models beside them; the paths."""
    paths = []
    for name in sample.MODELS:
        path = folder / sample.profile_path(name).name
        path.write_text(fit(name, folder).to_json() + "\n", encoding="utf-8")
        paths.append(path)
    return paths


if __name__ == "__main__":
    write()
