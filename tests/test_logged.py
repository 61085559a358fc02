"""What the notebook's first execution left on the server, asked through MLflow's own client."""

import json
import os
import sys
from contextlib import chdir
from pathlib import Path

import mlflow
import pandas as pd
import pytest
from helpers import EXPERIMENT, NAME, ROOT, RUNS, SCRIPTS, shell
from packaging.requirements import Requirement
from sklearn.datasets import load_iris
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import accuracy_score, log_loss
from sklearn.model_selection import train_test_split


@pytest.fixture(scope="module", params=RUNS)
def number(request):
    return request.param


@pytest.fixture(scope="module")
def version(client, number):
    return client.get_model_version(NAME, number)


@pytest.fixture(scope="module")
def run(client, version):
    return client.get_run(version.run_id)


@pytest.fixture(scope="module")
def model_folder(client, version, tmp_path_factory):
    mlflow.set_tracking_uri(client.tracking_uri)
    folder = tmp_path_factory.mktemp("model")
    return Path(
        mlflow.artifacts.download_artifacts(version.source, dst_path=str(folder))
    )


@pytest.fixture(scope="module")
def split():
    iris = load_iris(as_frame=True)
    species = pd.Series(iris.target_names[iris.target], name="species")
    return train_test_split(
        iris.data, species, test_size=0.2, random_state=42, stratify=species
    )


def test_an_execution_makes_two_finished_runs_in_its_experiment_and_no_other(client):
    experiments = {e.name: e.experiment_id for e in client.search_experiments()}
    assert set(experiments) == {"Default", EXPERIMENT}
    runs = client.search_runs(list(experiments.values()))
    assert {run.info.run_name for run in runs} == {name for name, _, _ in RUNS.values()}
    where = [(run.info.experiment_id, run.info.status) for run in runs]
    assert where == [(experiments[EXPERIMENT], "FINISHED")] * 2


def test_the_two_runs_differ_in_solver_c_and_seed():
    first, second = (params for _, params, _ in RUNS.values())
    assert {key for key in first if first[key] != second[key]} == {
        *("solver", "C", "random_state"),
    }


def test_a_run_has_its_name_parameters_tags_and_confusion_matrix(client, run, number):
    name, params, training_info = RUNS[number]
    own_tags = {k: v for k, v in run.data.tags.items() if not k.startswith("mlflow.")}
    assert run.info.run_name == name
    assert run.data.params == {key: str(value) for key, value in params.items()}
    assert own_tags == {"training info": training_info, "task": "classification"}
    assert run.data.tags["mlflow.source.name"] == "project.ipynb"
    (artifact,) = client.list_artifacts(run.info.run_id)
    assert artifact.path == "confusion_matrix.png"


def test_the_metrics_are_those_of_the_registered_model_on_the_shared_test_set(
    client, run, split
):
    mlflow.set_tracking_uri(client.tracking_uri)
    _, X_test, _, y_test = split
    model = mlflow.sklearn.load_model(
        f"models:/{run.outputs.model_outputs[0].model_id}"
    )
    accuracy = accuracy_score(y_test, model.predict(X_test))
    loss = log_loss(y_test, model.predict_proba(X_test))
    assert run.data.metrics == pytest.approx({"accuracy": accuracy, "log_loss": loss})


def test_the_metrics_say_of_which_model_and_on_which_data_they_are(client, run, split):
    (output,) = run.outputs.model_outputs
    test_data = mlflow.data.from_pandas(split[1].join(split[3]), targets="species")
    metrics = client.get_logged_model(output.model_id).metrics
    assert {(m.key, m.dataset_name, m.dataset_digest) for m in metrics} == {
        ("accuracy", "iris-test", test_data.digest),
        ("log_loss", "iris-test", test_data.digest),
    }


def test_a_run_names_the_data_that_it_was_trained_and_tested_on(run, split):
    X_train, X_test, y_train, y_test = split
    inputs = run.inputs.dataset_inputs
    logged = {(i.tags[0].value, i.dataset.name, i.dataset.digest) for i in inputs}
    train, test = (
        mlflow.data.from_pandas(X.join(y), targets="species").digest
        for X, y in [(X_train, y_train), (X_test, y_test)]
    )
    assert logged == {("training", "iris-train", train), ("test", "iris-test", test)}


def test_a_model_carries_requirements_txt(model_folder):
    def requirements(path):
        lines = [
            line for line in path.read_text().splitlines() if line and line[0] != "#"
        ]
        return [
            str(Requirement(line)) for line in lines
        ]  # MLflow writes markers otherwise

    logged = requirements(model_folder / "requirements.txt")
    assert logged == requirements(ROOT / "requirements.txt")


def test_a_guess_that_succeeds_names_what_is_imported_and_not_what_that_pulls_in(
    split, tmp_path
):
    X_train, _, y_train, _ = split
    mlflow.sklearn.save_model(
        LogisticRegression(max_iter=1000).fit(X_train, y_train), tmp_path
    )
    lines = (tmp_path / "requirements.txt").read_text().splitlines()
    names = {Requirement(line).name for line in lines}
    assert names >= {"scikit-learn", "skops", "numpy", "scipy", "pandas"}
    assert not names & {"joblib", "threadpoolctl", "python-dateutil"}


@pytest.mark.slow
def test_in_a_uv_project_mlflow_exports_the_lock_and_does_not_guess(
    split, tmp_path, monkeypatch
):
    monkeypatch.setenv("PATH", str(SCRIPTS), prepend=os.pathsep)  # there is uv
    (tmp_path / "pyproject.toml").write_text(
        '[project]\nname = "p"\nversion = "1"\nrequires-python = ">=3.11"\n'
        'dependencies = ["scikit-learn"]\n'
    )
    shell(f"uv lock -q --python '{sys.executable}'", tmp_path)
    model = LogisticRegression(max_iter=1000).fit(split[0], split[2])
    with chdir(tmp_path):
        mlflow.sklearn.save_model(model, "model")
    names = {
        Requirement(line).name
        for line in Path(tmp_path, "model", "requirements.txt").read_text().splitlines()
    }
    assert names >= {"joblib", "threadpoolctl"}  # which no guess names


def test_a_model_has_a_signature_and_an_input_example(model_folder, split):
    signature = mlflow.models.Model.load(model_folder).signature
    columns = [(spec.name, spec.type.name, spec.required) for spec in signature.inputs]
    assert columns == [(name, "double", True) for name in split[0].columns]
    outputs = [(spec.name, spec.type.name) for spec in signature.outputs]
    assert outputs == [(None, "string")]  # what the model returns; labels have a name
    example = json.loads((model_folder / "serving_input_example.json").read_text())
    expected = split[1].head(3).reset_index(drop=True)
    assert pd.DataFrame(**example["dataframe_split"]).equals(expected)


def test_a_version_says_where_it_comes_from_and_what_it_is(
    client, run, version, number
):
    assert version.source == f"models:/{run.outputs.model_outputs[0].model_id}"
    assert version.description == RUNS[number][2]
    assert version.tags == ({"validation": "passed"} if number == "2" else {})
    assert version.aliases == (["champion"] if number == "2" else [])
    assert "Iris" in client.get_registered_model(NAME).description
