"""The champion as others meet it: refusing bad input, and served over HTTP."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import mlflow
import nbformat
import numpy as np
import pytest
import requests
from conftest import ROOT, free_port, running
from sklearn.datasets import load_iris

FLOWERS = load_iris(as_frame=True).data
WIDTH = "petal width (cm)"
URI = "models:/tracking_quick_start@champion"
BAD_INPUT = {
    "missing column": (FLOWERS.drop(columns=WIDTH), r"missing inputs \['petal width \(cm\)'\]"),
    "renamed column": (FLOWERS.rename(columns={WIDTH: "width"}), "missing inputs"),
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


def test_an_extra_column_is_left_out(champion):
    assert list(champion.predict(FLOWERS.assign(colour="blue"))) == list(champion.predict(FLOWERS))


@pytest.mark.skipif(os.name == "nt", reason="the commands are for Linux and macOS")
def test_the_champion_is_served_by_the_commands_that_the_notebook_gives(client, tmp_path):
    closing = nbformat.read(ROOT / "project.ipynb", as_version=4).cells[-1].source
    look, serve, ask = re.findall(r"```(?:bash|python)\n(.*?)```", closing, re.DOTALL)
    assert f".venv/bin/{look}" in (ROOT / "README.md").read_text()  # test_readme.py runs it
    port = str(free_port())
    serve = serve.replace("http://127.0.0.1:5000", client.tracking_uri).replace("5010", port)
    ask = ask.replace("5010", port)
    scripts = str(Path(sys.executable).parent)
    env = os.environ | {"PATH": f"{scripts}{os.pathsep}{os.environ['PATH']}"}

    address = f"http://127.0.0.1:{port}"
    with running(["bash", "-c", serve], f"{address}/ping", tmp_path / "serve.log", env=env):
        answer = subprocess.check_output([sys.executable, "-c", ask], text=True)
        assert f"This prints `{answer.strip()}`" in closing

        version = client.get_model_version_by_alias("tracking_quick_start", "champion")
        folder = mlflow.artifacts.download_artifacts(version.source)
        example = json.loads(Path(folder, "serving_input_example.json").read_text())
        served = requests.post(f"{address}/invocations", json=example, timeout=10).json()
        here = mlflow.pyfunc.load_model(URI).predict(FLOWERS.loc[[38, 127, 57]])
        assert served["predictions"] == list(here)

        wrong = requests.post(f"{address}/invocations", json={"flower": 1}, timeout=10)
        assert wrong.status_code == 400
        assert wrong.json()["message"]
