"""The recipes of docs/how-to/export-predictions.md, run as written by the tools they are for."""

import json
import os
import re
import subprocess
from pathlib import Path

import numpy as np
import pytest

from gateway.labels.rows import Kept, Label, pack
from gateway.labels.store import Store
from tests.serving import driftgate

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs/how-to/export-predictions.md"
N = 6000
QUIET = {"DO_NOT_TRACK": "1", "NML_DISABLE_USAGE_LOGGING": "1", "MPLBACKEND": "agg"}


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An exported file: calibrated scores, an amount that moves half way, a steady place."""
    home = tmp_path_factory.mktemp("readers")
    url = f"sqlite:///{home / 'labels.sqlite3'}"
    store = Store(url)
    draw = np.random.default_rng(3)
    scores, places = draw.random(N), draw.integers(0, 3, N)
    amounts = draw.normal(np.where(np.arange(N) < N // 2, 0, 1.5))
    store.keep([
        Kept(f"r{k}", 0, "flights", 7, "primary", "champion", 1.7e9 + 60 * k, 1.0, 1.0, None,
             pack({"score": float(scores[k])}),
             pack({"amount": float(amounts[k]), "place": f"p{places[k]}"}))
        for k in range(N)
    ])  # fmt: skip
    truth = draw.random(N) < scores
    labels = [Label(f"r{k}", 0, "flights", float(truth[k])) for k in range(0, N, 2)]
    store.label(labels, 1.8e9, is_kept=[True] * len(labels))
    store.close()
    ended = driftgate(
        "export", "flights", "--to", str(home / "flights.parquet"), "--url", url,
        "--since", "2023-11-14",
    )  # fmt: skip
    assert ended.returncode == 0, ended.stderr
    return home


def run(directory: Path, tool: str, more: str) -> dict:
    """What the page's recipe for a tool gives, with a line that prints it."""
    python = ROOT / ".venv-readers" / tool / "bin/python"
    if not (python.parents[1] / ".installed").exists():
        pytest.skip(f"{tool} could not be installed here")
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text("utf-8"), flags=re.DOTALL)
    (recipe,) = [
        block for block in blocks if re.search(rf"^(import|from) {tool}\b", block, re.MULTILINE)
    ]
    ended = subprocess.run(
        [python, "-c", f"{recipe}\nimport json\nprint(json.dumps({more}))"],
        cwd=directory, env={**os.environ, **QUIET}, capture_output=True, text=True, timeout=120,
        check=False,
    )  # fmt: skip
    assert ended.returncode == 0, ended.stderr[-2000:]
    return json.loads(ended.stdout.splitlines()[-1])


def test_evidently_reads_it_and_sees_what_moved(directory: Path) -> None:
    """One of two columns has drifted, and there is a page about it."""
    found = run(directory, "evidently", "found.dict()")

    drift = {
        metric["config"]["column"]: metric["value"]
        for metric in found["metrics"]
        if "column" in metric["config"]
    }
    assert drift["features.amount"] > 0.5
    assert drift["features.place"] < 0.1
    assert (directory / "drift.html").stat().st_size > 10_000


def test_nannyml_reads_it_and_estimates_what_the_scores_are_worth(directory: Path) -> None:
    """Of uniform calibrated scores the area under the curve is 5/6, without their labels."""
    found = run(
        directory,
        "nannyml",
        '{"auc": estimated["roc_auc"]["value"].tolist(),'
        ' "amount": drifted["features.amount"]["jensen_shannon"]["alert"].tolist(),'
        ' "place": drifted["features.place"]["jensen_shannon"]["alert"].tolist()}',
    )

    assert np.mean(found["auc"]) == pytest.approx(5 / 6, abs=0.02)
    assert len(found["auc"]) == 10
    assert all(found["amount"])
    assert sum(found["place"]) <= 3


REAL = """
import json
import numpy as np
import statsmodels.api as sm
from sklearn import datasets
from monitors import Budget, Monitor, Profile

tables = {}
for name in ("randhie", "fair", "anes96"):
    table = getattr(sm.datasets, name).load_pandas().data
    tables[name] = {column: table[column].to_numpy() for column in table}
for name in ("digits", "breast_cancer", "wine"):
    rows = getattr(datasets, f"load_{name}")().data
    tables[name] = {f"x{k}": column for k, column in enumerate(rows.T)}
found = {}
for name, columns in tables.items():
    n = len(next(iter(columns.values())))
    pages = 0
    for seed in range(20):
        order = np.random.default_rng(seed).permutation(n)
        rows = {column: values[order] for column, values in columns.items()}
        reference = {column: values[: n // 2] for column, values in rows.items()}
        monitor = Monitor(Profile.fit(reference), budget=Budget(rows=2000))
        for start in range(n // 2, n, 50):
            monitor.update({column: v[start : start + 50] for column, v in rows.items()})
        pages += len({a.episode for a in monitor.episodes if a.level == "page"})
    found[name] = (pages, 20 * (n - n // 2) / 2000)
print(json.dumps(found))
"""


def test_real_tables_that_packages_carry_are_quiet_in_any_order() -> None:
    """Health insurance, surveys, scans and cells: half a shuffled table against the other half.

    Twenty orders each; the budget allows one page in 2,000 rows, and next to none are seen.
    """
    python = ROOT / ".venv-readers/nannyml/bin/python"
    if not python.exists():
        pytest.skip("statsmodels and scikit-learn come with NannyML, which could not be installed")
    ended = subprocess.run(
        [python, "-c", REAL], cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert ended.returncode == 0, ended.stderr[-2000:]
    found = json.loads(ended.stdout.splitlines()[-1])

    assert len(found) == 6
    for name, (pages, allowed) in found.items():
        assert pages <= max(1, allowed / 5), name
