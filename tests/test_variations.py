"""The notebook under other circumstances: other data, other settings, its exercises. All slow."""

import os
import re
import shutil
import subprocess
import sys

import mlflow
import nbformat
import pytest
from nbclient.exceptions import CellExecutionError
from suite import (
    ROOT,
    SCRIPTS,
    SHORT,
    answering,
    execute,
    free_port,
    read_notebook,
    running,
    shown,
)

pytestmark = pytest.mark.slow


def source(cell_id, language="python"):
    """Return the block of code in an exercise."""
    (cell,) = [cell for cell in read_notebook().cells if cell.id == cell_id]
    (block,) = re.findall(rf"```{language}\n(.*?)```", cell.source, re.DOTALL)
    return block


def prose(cell_id):
    """Return an exercise without its code."""
    (cell,) = [cell for cell in read_notebook().cells if cell.id == cell_id]
    return re.sub(r"```.*?```", "", cell.source, flags=re.DOTALL)


IRIS = """
from sklearn.datasets import load_iris

iris = load_iris(as_frame=True)
data = iris.data.assign(species=iris.target_names[iris.target])
target, data_name, model_name = "species", "own", "{name}"
{change}
data.groupby(target).head(1)
"""
DATA = {
    "float32, odd names, rows removed, dates that repeat in the index": """
import pandas as pd
data = data[data["petal width (cm)"] != 0.2]
data = data.astype({name: "float32" for name in iris.feature_names})
data.columns = ["a, b", 'c "d"', "花", "e: f", target]
data.index = pd.to_datetime("2026-01-01") + pd.to_timedelta(data.index % 75, "D")
""",
    "int32, classes as numbers": """
data = (iris.data * 10).round().astype("int32").assign(species=iris.target)
""",
}


@pytest.mark.parametrize("kind", DATA)
def test_data_of_ones_own_run_through_the_page(client, tmp_path, kind):
    name = f"own_{list(DATA).index(kind)}"
    own = SHORT | {"load-data": IRIS.format(name=name, change=DATA[kind])}
    notebook = execute(tmp_path, own)
    better = "1" if kind.startswith("int32") else "2"
    assert shown(notebook, "promote").endswith(f"{{'champion': '{better}'}}")
    equal = re.findall(r"(\d+) of (\d+) answers", shown(notebook, "check-versions"))
    assert len(equal) == 2 and all(a == b for a, b in equal)
    run = client.get_run(client.get_model_version(name, "2").run_id)
    names = {used.dataset.name for used in run.inputs.dataset_inputs}
    assert names == {"own-train", "own-test"}


def test_wine_has_its_answers_figures_whatever_the_folder_and_the_settings(tmp_path):
    settings = {
        "MLFLOW_REQUIREMENTS_INFERENCE_RAISE_ERRORS": "true",
        "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "4",
        "PYTHONOPTIMIZE": "1",
    }
    left = 'print(os.environ["MLFLOW_HTTP_REQUEST_MAX_RETRIES"])'
    folder, wine = tmp_path / "Mappe mit Wörtern 花", source("exercise-data")
    notebook = execute(folder, {"load-data": wine}, add=[left], **settings)
    assert shown(notebook, "added-1") == "4\n"
    assert {path.name for path in folder.iterdir()} == {"requirements.txt"}
    figures = re.findall(r"\d\.\d{4}", prose("exercise-data"))
    assert len(figures) == 4
    table = shown(notebook, "compare-runs")
    assert [figure for figure in figures if figure not in table] == []
    assert shown(notebook, "promote").endswith("{'champion': '2'}")


def test_a_forest_is_refused_until_its_type_is_trusted_then_runs_through(tmp_path):
    saved = {cell.id: cell.source for cell in read_notebook().cells}
    forest = SHORT | {"load-data": ("tracking_quick_start", "forest")}
    for cell, trees in (("run-lbfgs", 10), ("run-newton-cg", 100)):
        model = f"RandomForestClassifier({trees}, random_state=42)"
        forest[cell] = "from sklearn.ensemble import RandomForestClassifier\n"
        forest[cell] += re.sub(r"LogisticRegression\(.*\)", model, saved[cell])
    with pytest.raises(CellExecutionError, match="untrusted types"):
        execute(tmp_path, forest)
    line = 'pip_requirements="requirements.txt",'
    trusted = {"define-training": (line, f"{line}\n{source('exercise-model')}")}
    notebook = execute(tmp_path, forest | trusted)
    assert shown(notebook, "check-versions").count("150 of 150") == 2
    assert "'champion': " in shown(notebook, "promote")


def test_the_exercises_answers_are_what_they_say(client, tmp_path):
    answers = [source(f"exercise-{name}") for name in ("cause", "rollback")]
    own = SHORT | {"load-data": ("tracking_quick_start", "exercises")}
    notebook = execute(tmp_path, own, add=answers)
    cause, rollback = shown(notebook, "added-1"), shown(notebook, "added-2")
    for figure in re.findall(r"\d\.\d{4}", prose("exercise-cause")):
        assert figure in cause and figure in shown(notebook, "compare-runs")
    assert "wins=False" in cause and "wins=False" in prose("exercise-cause")
    assert "virginica" in rollback and "*virginica*" in prose("exercise-rollback")


def test_a_token_goes_to_the_server(tmp_path):
    with answering(401) as (address, heard):
        account = {"MLFLOW_TRACKING_TOKEN": "secret", "HOME": str(tmp_path)}
        with pytest.raises(CellExecutionError, match="401") as stopped:
            execute(tmp_path, until="connect", MLFLOW_TRACKING_URI=address, **account)
    assert heard == ["Bearer secret"] and "secret" not in str(stopped.value)


def test_a_guess_names_nothing_that_scikit_learn_needs_in_turn(client):
    guess = mlflow.models.infer_pip_requirements(
        "models:/tracking_quick_start/2", flavor="sklearn"
    )
    assert not {line.split("==")[0] for line in guess} & {"joblib", "threadpoolctl"}


def test_mlflows_own_call_fails_where_the_page_says_it_does(client, tmp_path):
    """Red for the space: MLflow has mended it, and its call can take our function's place."""
    (tmp_path / "a space").mkdir()
    (tmp_path / "plain").symlink_to(tmp_path / "a space")  # one environment, two paths
    uv, environment = [SCRIPTS / "uv", "--quiet"], tmp_path / "plain" / ".venv"
    make = [*uv, "venv", "--seed", "--python", sys.executable, environment]
    lock = ["--requirements", ROOT / "requirements.txt"]
    install = [*uv, "pip", "install", "--python", environment, *lock]
    for command in (make, install):
        subprocess.run(command, check=True)
    program = """if True:
        import mlflow
        from sklearn.datasets import load_iris
        X = load_iris(as_frame=True).data
        mlflow.models.predict("models:/tracking_quick_start/1", X, env_manager="uv")
    """
    for folder, works in (("plain", True), ("a space", False)):
        programs = tmp_path / folder / ".venv" / "bin"
        done = subprocess.run(
            [programs / "python", "-c", program],
            env=os.environ | {"PATH": f"{programs}{os.pathsep}{os.environ['PATH']}"},
            check=False,
            stderr=subprocess.PIPE,
            text=True,
        )
        assert (done.returncode == 0) == works, done.stderr
        assert ("can't open file" in done.stderr) != works


@pytest.mark.skipif(sys.version_info >= (3, 13), reason="no Python 3.12 or older")
def test_mlflow_2_runs_the_page_with_the_edits_that_readme_names(tmp_path):
    notebook = read_notebook()
    metrics = r"mlflow.log_metrics\(\s+scores\(model\)[^)]+\)"
    edits = [('name="model"', 'artifact_path="model"')]
    edits += [(metrics, "mlflow.log_metrics(scores(model), run_id=logged.run_id)")]
    lock = (ROOT / "tests" / "requirements.in").read_text()
    pins = [(r"(?m)^mlflow==.*", "mlflow==2.16.2"), (r"(?m)^pandas==.*", "pandas<3")]
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    for _, new in edits + pins:
        assert f"`{new}`" in readme
    for old, new in edits:
        (cell,) = [cell for cell in notebook.cells if re.search(old, cell.source)]
        cell.source = re.sub(old, new, cell.source)
    for old, new in [*pins, (r"(?m)^cryptography==.*\n", "")]:
        lock = re.sub(old, new, lock)
    nbformat.write(notebook, tmp_path / "project.ipynb")
    (tmp_path / "requirements.in").write_text(lock)
    shutil.copy(ROOT / "requirements.txt", tmp_path)
    uv, port = [SCRIPTS / "uv", "--quiet"], free_port()
    address, new = f"http://127.0.0.1:{port}", tmp_path / ".venv" / "bin"
    files = ["requirements.in", "--output-file", "requirements.txt"]
    for command in (
        [*uv, "venv", "--seed", "--python", sys.executable],
        [*uv, "pip", "compile", "--python", new / "python", *files],
        [*uv, "pip", "install", "--python", new / "python", "-r", "requirements.txt"],
    ):
        subprocess.run(command, cwd=tmp_path, check=True)
    env = os.environ | {"MLFLOW_TRACKING_URI": address}
    env["PATH"] = f"{new}{os.pathsep}{os.environ['PATH']}"
    serve = [new / "mlflow", "server", "--port", str(port), "--workers", "1"]
    run = [new / "jupyter", "nbconvert", "--execute", "--inplace", "project.ipynb"]
    with running(serve, address, tmp_path / "log", cwd=tmp_path, env=env):
        subprocess.run([*run, "--to", "notebook"], cwd=tmp_path, env=env, check=True)
    executed = nbformat.read(tmp_path / "project.ipynb", 4)
    assert shown(executed, "promote").endswith("{'champion': '2'}")


def test_where_autolog_is_on_the_metrics_belong_to_the_registered_model_alone(
    client, tmp_path
):
    (saved,) = [c.source for c in read_notebook().cells if c.id == "define-training"]
    edits = {"load-data": ("tracking_quick_start", "autologged")}
    edits["define-training"] = f"mlflow.autolog(silent=True)\n{saved}"
    execute(tmp_path, edits, until="register")
    version = client.get_model_version("autologged", "1")
    made = client.get_run(version.run_id).outputs.model_outputs
    models = {model.model_id: client.get_logged_model(model.model_id) for model in made}
    measured = {i: {m.key for m in model.metrics} for i, model in models.items()}
    assert {"accuracy", "log_loss"} <= measured.pop(version.source.split("/")[1])
    assert measured and not any("accuracy" in keys for keys in measured.values())
