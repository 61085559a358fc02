"""What a whole execution of the notebook leaves on the server, asked through MLflow's own client."""

import json
import logging
import re
from pathlib import Path

import mlflow
import pytest
from packaging.requirements import Requirement
from sklearn.datasets import load_iris
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import log_loss
from sklearn.model_selection import train_test_split
from suite import ROOT, read_notebook

NAME = "tracking_quick_start"
RUNS = {  # version: the run's name and its model
    "1": (
        "lbfgs, C=1",
        LogisticRegression(solver="lbfgs", C=1.0, max_iter=1000, random_state=42),
    ),
    "2": (
        "newton-cg, C=10",
        LogisticRegression(solver="newton-cg", C=10.0, max_iter=1000, random_state=7),
    ),
}


@pytest.fixture(scope="session", params=RUNS)
def version(client, request):
    return client.get_model_version(NAME, request.param)


@pytest.fixture(scope="session")
def run(client, version):
    return client.get_run(version.run_id)


@pytest.fixture(scope="session")
def split():
    """The training and the test data, each with its species."""
    iris = load_iris(as_frame=True)
    data = iris.data.assign(species=iris.target_names[iris.target])
    return train_test_split(data, test_size=0.2, random_state=42, stratify=data.species)


def digests(split):
    """Return the names and the digests that MLflow gives to these data."""
    names = ("iris-train", "iris-test")
    return {(n, mlflow.data.from_pandas(d).digest) for n, d in zip(names, split)}


def test_the_experiment_has_a_baseline_of_one_parameter_and_one_metric(client, split):
    version = client.get_model_version(NAME, "1")
    experiment = client.get_run(version.run_id).info.experiment_id
    runs = client.search_runs([experiment], "run_name = 'baseline'")
    assert runs[-1].data.params == {"strategy": "prior"}
    share = split[1].species.value_counts(normalize=True).max()
    assert runs[-1].data.metrics == {"accuracy": pytest.approx(share)}
    assert {run.info.status for run in runs} == {"FINISHED"}


def test_a_run_has_its_name_parameters_tag_and_confusion_matrix(client, run, version):
    name, model = RUNS[version.version]
    assert (run.info.run_name, run.info.status) == (name, "FINISHED")
    params = {key: str(value) for key, value in model.get_params().items()}
    assert run.data.params == params
    own = {key for key in run.data.tags if not key.startswith("mlflow.")}
    assert own == {"training info"} and run.data.tags["training info"]
    files = [file.path for file in client.list_artifacts(run.info.run_id)]
    assert files == ["confusion_matrix.png"]


def test_metrics_and_answers_are_those_of_a_model_trained_here(run, version, split):
    train, test = (part.drop(columns="species") for part in split)
    model = RUNS[version.version][1].fit(train, split[0].species)
    assert run.data.metrics == pytest.approx(
        {
            "accuracy": model.score(test, split[1].species),
            "log_loss": log_loss(split[1].species, model.predict_proba(test)),
        }
    )
    loaded = mlflow.pyfunc.load_model(f"models:/{NAME}/{version.version}")
    assert list(loaded.predict(test)) == list(model.predict(test))


def test_the_metrics_name_their_model_and_the_test_data(client, run, split):
    (output,) = run.outputs.model_outputs
    metrics = client.get_logged_model(output.model_id).metrics
    measured = {(m.key, m.dataset_name, m.dataset_digest) for m in metrics}
    ((_, digest),) = digests(split) - digests(split[:1])
    assert measured == {(key, "iris-test", digest) for key in run.data.metrics}


def test_a_run_names_the_data_of_its_training_and_of_its_test(run, split):
    inputs = run.inputs.dataset_inputs
    assert {(i.dataset.name, i.dataset.digest) for i in inputs} == digests(split)
    contexts = {i.dataset.name: [tag.value for tag in i.tags] for i in inputs}
    assert contexts == {"iris-train": ["training"], "iris-test": []}


def test_a_version_comes_from_its_runs_model_and_is_checked(client, run, version):
    (output,) = run.outputs.model_outputs
    assert version.source == f"models:/{output.model_id}"
    assert version.tags == {"fresh_environment": "passed"}


def test_the_second_version_alone_is_champion(client):
    assert client.get_registered_model(NAME).aliases == {"champion": "2"}


def test_a_model_carries_the_lock(version):
    def parsed(text):  # MLflow writes markers otherwise, and no comments
        lines = [line.partition("#")[0].strip() for line in text.splitlines()]
        return {str(Requirement(line)) for line in lines if line}

    uri = f"models:/{NAME}/{version.version}/requirements.txt"
    logged = mlflow.artifacts.load_text(uri)
    assert parsed(logged) == parsed((ROOT / "requirements.txt").read_text("utf-8"))
    assert "#" not in logged


def test_a_model_has_a_signature_and_an_input_example(version, split, tmp_path):
    uri = f"models:/{NAME}/{version.version}"
    folder = Path(mlflow.artifacts.download_artifacts(uri, dst_path=str(tmp_path)))
    signature = mlflow.models.Model.load(folder).signature
    columns = list(split[1].columns.drop("species"))
    inputs = [(spec.name, spec.type.name, spec.required) for spec in signature.inputs]
    assert inputs == [(name, "double", True) for name in columns]
    assert [spec.type.name for spec in signature.outputs] == ["string"]
    example = json.loads((folder / "serving_input_example.json").read_text())
    expected = split[1].head(3).drop(columns="species").to_numpy().tolist()
    assert example["dataframe_split"] == {"columns": columns, "data": expected}


def test_a_model_logged_while_the_guess_fails_warns_and_lists_what_the_page_says(
    split, monkeypatch, tmp_path, caplog
):
    monkeypatch.setenv("MLFLOW_REQUIREMENTS_INFERENCE_TIMEOUT", "0")
    monkeypatch.setattr(logging.getLogger("mlflow"), "propagate", True)
    train = split[0].drop(columns="species")
    model = LogisticRegression(max_iter=1000).fit(train, split[0].species)
    mlflow.sklearn.save_model(model, tmp_path / "model")
    lines = (tmp_path / "model" / "requirements.txt").read_text().splitlines()
    listed = [Requirement(line).name for line in lines]
    page = "".join(cell.source for cell in read_notebook().cells)
    assert f"a list of {listed[0]}, {listed[1]} and {listed[2]}" in page
    words = re.search("warns of `(.+?)`", page)[1]
    assert len(listed) == 3 and words in caplog.text
    monkeypatch.setenv("MLFLOW_REQUIREMENTS_INFERENCE_RAISE_ERRORS", "true")
    with pytest.raises(mlflow.MlflowException):
        mlflow.sklearn.save_model(model, tmp_path / "other")
