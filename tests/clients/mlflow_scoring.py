"""MLflow's clients of its scoring server. The server is told which model they mean: `mixed`."""

import os

os.environ["MLFLOW_DISABLE_TELEMETRY"] = "true"

import numpy as np
import pandas as pd
import pytest
import requests
from mlflow.deployments import PredictionsResponse
from mlflow.pyfunc.scoring_server import CONTENT_TYPE_CSV, CONTENT_TYPE_JSON
from mlflow.pyfunc.scoring_server.client import ScoringServerClient
from mlflow.utils.proto_json_utils import dump_input_data

FRAME = pd.DataFrame(
    {"amount": [1.5, -2.25, 0.0], "count": [1, 2**53, -7], "place": ["a", "Zürich", ""]}
)


@pytest.fixture
def client(address):
    host, port = address.split(":")
    return ScoringServerClient(host, int(port))


def assert_answers(frame, sent=FRAME):
    """The model gives twice the amount, the place and the count."""
    np.testing.assert_array_equal(frame["twice"], 2 * sent["amount"])
    assert list(frame["where"]) == list(sent["place"])
    assert [int(n) for n in frame["n_seen"]] == list(sent["count"])


def test_the_server_is_ready_and_says_its_version(client):
    """The client pings until 200, and reads /version as text."""
    client.wait_server_ready(timeout=5)

    assert client.get_version().strip()


def test_a_frame_is_scored(client):
    """The client sends dataframe_split and reads `predictions` as a frame."""
    assert_answers(client.invoke(FRAME).get_predictions())


def test_parameters_are_tolerated(client):
    """`params` is for models that declare some."""
    assert_answers(client.invoke(FRAME, params={"temperature": 0.5}).get_predictions())


@pytest.mark.parametrize(
    "body",
    [
        {"dataframe_records": FRAME.to_dict(orient="records")},
        {"instances": FRAME.to_dict(orient="records")},
        {"inputs": FRAME.to_dict(orient="list")},
        {"dataframe_split": FRAME.to_dict(orient="split")},
        {"dataframe_split": FRAME[["place", "count", "amount"]].to_dict(orient="split")},
    ],
    ids=["records", "instances", "inputs", "split", "split-in-another-order"],
)
def test_every_orientation_of_the_json_is_scored(url, body):
    """The shapes of MLflow's documents, read with its own answer class."""
    got = requests.post(f"{url}/invocations", json=body, timeout=10)

    assert got.status_code == 200, got.text
    assert_answers(PredictionsResponse.from_json(got.text).get_predictions())


def test_csv_is_scored(url):
    """A header row, then one row a line; numbers are typed by the model."""
    got = requests.post(
        f"{url}/invocations",
        data=FRAME.to_csv(index=False).encode(),
        headers={"Content-Type": CONTENT_TYPE_CSV},
        timeout=10,
    )

    assert got.status_code == 200, got.text
    assert_answers(PredictionsResponse.from_json(got.text).get_predictions())


def test_the_content_type_of_mlflow_is_taken_as_it_is_sent(url):
    """`dump_input_data` and the JSON type, as every MLflow client sends them."""
    got = requests.post(
        f"{url}/invocations",
        data=dump_input_data(FRAME),
        headers={"Content-Type": f"{CONTENT_TYPE_JSON}; charset=UTF-8"},
        timeout=10,
    )

    assert got.status_code == 200, got.text


def test_a_missing_column_is_an_error_with_its_name(client):
    """400 with error_code and message; the client repeats both."""
    with pytest.raises(Exception, match=r"error code 400.*count") as caught:
        client.invoke(FRAME.drop(columns="count"))

    assert "error_code" in str(caught.value)
    assert "message" in str(caught.value)


def test_another_type_is_refused_with_415(url):
    """As MLflow's own server does."""
    got = requests.post(
        f"{url}/invocations", data=b"x", headers={"Content-Type": "image/png"}, timeout=10
    )

    assert got.status_code == 415
