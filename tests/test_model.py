"""The champion as others meet it: refusing bad input, and served over HTTP."""

import json
import os
import subprocess
import sys
from pathlib import Path

import mlflow
import numpy as np
import pytest
import requests
from helpers import NAME, SCRIPTS, commands, free_port, running, section
from sklearn.datasets import load_iris

FLOWERS = load_iris(as_frame=True).data
WIDTH = "petal width (cm)"
URI = f"models:/{NAME}@champion"
BAD_INPUT = {
    "missing column": (FLOWERS.drop(columns=WIDTH), r"missing inputs \['petal width \(cm\)'\]"),
    "text for a number": (FLOWERS.assign(**{WIDTH: "narrow"}), "Can not safely convert str"),
    "no rows": (FLOWERS.head(0), "Found array with 0 sample"),
    "not a number": (FLOWERS.assign(**{WIDTH: np.nan}), "Input X contains NaN"),
}


@pytest.fixture
def champion(client):
    mlflow.set_tracking_uri(client.tracking_uri)
    return mlflow.pyfunc.load_model(URI)


@pytest.mark.parametrize("kind", BAD_INPUT)
def test_bad_input_is_refused_in_clear_words(champion, kind):
    flowers, message = BAD_INPUT[kind]
    with pytest.raises((mlflow.MlflowException, ValueError), match=message):
        champion.predict(flowers)


@pytest.mark.skipif(os.name == "nt", reason="the commands are for Linux and macOS")
def test_the_champion_is_served_by_the_commands_that_readme_gives(client, tmp_path):
    (serve,) = commands("README.md", "Serve the champion")
    (ask,) = commands("README.md", "Serve the champion", "python")
    port = str(free_port())
    serve = serve.replace("http://127.0.0.1:5000", client.tracking_uri).replace("5010", port)
    env = os.environ | {"PATH": f"{SCRIPTS}{os.pathsep}{os.environ['PATH']}"}

    address = f"http://127.0.0.1:{port}"
    with running(["bash", "-c", serve], f"{address}/ping", tmp_path / "serve.log", env=env):
        ask = [sys.executable, "-c", ask.replace("5010", port)]
        answer = subprocess.check_output(ask, text=True).strip()
        assert f"`{answer}`" in section("README.md", "Serve the champion")

        version = client.get_model_version_by_alias(NAME, "champion")
        folder = mlflow.artifacts.download_artifacts(version.source)
        example = json.loads(Path(folder, "serving_input_example.json").read_text())
        served = requests.post(f"{address}/invocations", json=example, timeout=10).json()
        here = mlflow.pyfunc.load_model(URI).predict(FLOWERS.loc[[38, 127, 57]])
        assert served["predictions"] == list(here)

        wrong = requests.post(f"{address}/invocations", json={"flower": 1}, timeout=10)
        assert wrong.status_code == 400
        assert wrong.json()["message"]
