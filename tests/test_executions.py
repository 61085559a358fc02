"""The notebook executed again: a second time, twice at once, after a failure, on a full server."""

import os
import re
import signal
import threading
from concurrent.futures import ThreadPoolExecutor

import mlflow
import nbformat
import pytest
from conftest import ROOT, execute, free_port, kernel, mlflow_server, output, wait_until
from nbclient.exceptions import CellExecutionError, DeadKernelError
from sklearn.datasets import load_iris

NAME = "tracking_quick_start"
EXPERIMENT = "mlflow quickstart"
SAVED = nbformat.read(ROOT / "project.ipynb", as_version=4)


def versions_shown(notebook):
    """Return the two versions of the registry's table; the notebook shows them as its own."""
    for cell in ["compare-runs", "predict", "validate-champion", "refuse-bad-input"]:
        assert output(notebook, cell) == output(SAVED, cell)
    first, second = re.findall(r"^\d +(\d+)", output(notebook, "list-versions"), re.MULTILINE)
    assert output(notebook, "choose-champion") == f"The champion is version {second}.\n"
    assert output(notebook, "reload-models") == (
        f"Version {first}: 30 of 30 predictions as before\n"
        f"Version {second}: 30 of 30 predictions as before\n"
    )
    (mistake,) = output(notebook, "find-mistakes").split("\n\n")[0].splitlines()[2:]
    assert mistake.split()[:2] == [first, "77"]
    return [int(first), int(second)]


def check(notebook):
    """Return the two versions; the second is the champion, as in the saved notebook."""
    versions = versions_shown(notebook)
    rows = output(notebook, "list-versions").splitlines()[1:]
    assert [row.split()[2] for row in rows] == ["lbfgs,", "champion"]
    return versions


def predictions(address, number):
    mlflow.set_tracking_uri(address)
    model = mlflow.pyfunc.load_model(f"models:/{NAME}/{number}")
    return list(model.predict(load_iris(as_frame=True).data))


def champion(client):
    return int(client.get_model_version_by_alias(NAME, "champion").version)


def test_a_second_execution_adds_versions_and_leaves_the_first_alone(client, tmp_path):
    before = [predictions(client.tracking_uri, number) for number in (1, 2)]
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    folder = tmp_path / "Mappe mit Wörtern 花"  # spaces and non-ASCII letters
    with kernel(folder, TMPDIR=str(scratch)) as run:
        assert check(run()) == [3, 4]
        assert not list(scratch.rglob("site-packages")), "the fresh environment is still there"
    assert champion(client) == 4
    assert [predictions(client.tracking_uri, number) for number in (1, 2)] == before


@pytest.mark.slow
def test_a_third_execution_then_two_at_once_never_share_a_version(tmp_path):
    with mlflow_server(tmp_path) as address:
        for expected in [1, 2], [3, 4], [5, 6]:
            notebook = execute(tmp_path / f"{expected}", MLFLOW_TRACKING_URI=address)
            assert check(notebook) == expected
        folders = [tmp_path / "left", tmp_path / "right"]
        with ThreadPoolExecutor() as pool:
            jobs = [pool.submit(execute, f, MLFLOW_TRACKING_URI=address) for f in folders]
            left, right = (versions_shown(job.result()) for job in jobs)
        assert sorted(left + right) == [7, 8, 9, 10]


@pytest.mark.slow
def test_a_server_full_of_other_runs_and_versions_changes_nothing(tmp_path):
    with mlflow_server(tmp_path) as address:
        client = mlflow.MlflowClient(address)
        experiment = client.create_experiment(EXPERIMENT)
        client.delete_experiment(client.create_experiment("another"))
        client.create_registered_model(NAME)
        for _ in range(200):
            run = client.create_run(experiment)
            client.log_metric(run.info.run_id, "accuracy", 1.0)
            for _ in range(2):
                client.create_model_version(NAME, run.info.artifact_uri, run.info.run_id)
        notebook = execute(tmp_path / "notebook", MLFLOW_TRACKING_URI=address)
        assert check(notebook) == [401, 402]


@pytest.mark.slow
def test_after_a_kernel_was_killed_in_a_run_the_next_execution_is_right(tmp_path):
    with mlflow_server(tmp_path) as address:
        client = mlflow.MlflowClient(address)
        with kernel(tmp_path / "killed", MLFLOW_TRACKING_URI=address) as run:
            run("settings", "define-training")
            runs = in_a_run(client, lambda: os.kill(run.pid, signal.SIGKILL))
            with pytest.raises(DeadKernelError):
                run("run-lbfgs", "run-lbfgs")
            runs.join()
        assert check(execute(tmp_path / "again", MLFLOW_TRACKING_URI=address))
        experiment = client.get_experiment_by_name(EXPERIMENT)
        found = client.search_runs([experiment.experiment_id])
        assert [r.info.status for r in found][:2] == ["FINISHED"] * 2


@pytest.mark.slow
def test_after_an_interrupt_in_a_run_the_server_is_there_and_run_all_finishes(tmp_path):
    address = f"http://127.0.0.1:{free_port()}"
    with kernel(tmp_path, MLFLOW_TRACKING_URI=address) as run:
        run("settings", "define-training")
        client = mlflow.MlflowClient(address)
        group = os.getpgid(run.pid)
        runs = in_a_run(client, lambda: os.killpg(group, signal.SIGINT))
        with pytest.raises(CellExecutionError, match="KeyboardInterrupt"):
            run("run-lbfgs", "run-lbfgs")
        runs.join()
        check(run())


def in_a_run(client, act):
    """Start a thread that acts as soon as the server has a run that is running."""
    experiment = client.get_experiment_by_name(EXPERIMENT).experiment_id
    status = "attributes.status = 'RUNNING'"

    def watch():
        wait_until(lambda: client.search_runs([experiment], status), 60, lambda: "no run")
        act()

    thread = threading.Thread(target=watch)
    thread.start()
    return thread


@pytest.mark.slow
def test_a_server_that_restarts_between_logging_and_reloading_has_lost_nothing(tmp_path):
    port = free_port()
    with kernel(tmp_path, MLFLOW_TRACKING_URI=f"http://127.0.0.1:{port}") as run:
        with mlflow_server(tmp_path, port):
            run("settings", "list-versions")
        with mlflow_server(tmp_path, port):
            check(run("reload-intro"))


@pytest.mark.slow
def test_a_server_that_is_lost_ends_in_an_error_that_says_what_to_do(tmp_path):
    with kernel(tmp_path, MLFLOW_TRACKING_URI=f"http://127.0.0.1:{(port := free_port())}") as run:
        with mlflow_server(tmp_path, port):
            run("settings", "run-lbfgs")
        with pytest.raises(CellExecutionError, match="The MLflow server is gone. Run All"):
            run("run-newton-cg", "run-newton-cg")
    with mlflow_server(tmp_path, port) as address:
        assert mlflow.MlflowClient(address).get_model_version(NAME, 1)
