"""The notebook executed again: a second time, twice at once, after a failure, on a full server."""

import os
import re
import signal
import threading
from concurrent.futures import ThreadPoolExecutor

import mlflow
import pytest
from helpers import (
    EXPERIMENT,
    NAME,
    execute,
    kernel,
    loopback,
    mlflow_server,
    need_network,
    notebook,
    output,
    refusal,
    wait_until,
)
from nbclient.exceptions import CellExecutionError, DeadKernelError
from sklearn.datasets import load_iris


def versions_shown(executed):
    """Return the two versions of the registry's table; all that it shows must be its own."""
    for cell in ["compare-runs", "reload-models", "validate", "use-champion"]:
        assert output(executed, cell) == output(notebook(), cell)
    table = output(executed, "list-versions")
    first, second = map(int, re.findall(r"^\d +(\d+)", table, re.MULTILINE))
    (mistake,) = output(executed, "find-mistakes").split("\n\n")[0].splitlines()[2:]
    assert mistake.split()[:2] == [str(first), "77"]
    assert output(executed, "promote") == f"Version {second} is the champion\n"
    return [first, second]


def predictions(address, number):
    mlflow.set_tracking_uri(address)
    model = mlflow.pyfunc.load_model(f"models:/{NAME}/{number}")
    return list(model.predict(load_iris(as_frame=True).data))


def test_a_second_execution_adds_versions_and_leaves_the_first_alone(client, tmp_path):
    address = client.tracking_uri
    before = [predictions(address, number) for number in (1, 2)]
    folder = tmp_path / "Mappe mit Wörtern 花"  # spaces and non-ASCII letters
    executed = execute(folder, address)
    assert versions_shown(executed) == [3, 4]
    rows = output(executed, "list-versions").splitlines()[1:]
    assert ["champion" in row for row in rows] == [False, True]
    assert client.get_model_version_by_alias(NAME, "champion").version == "4"
    assert [predictions(address, number) for number in (1, 2)] == before
    assert [path.name for path in folder.iterdir()] == ["requirements.txt"]  # nothing is left


@pytest.mark.slow
def test_two_notebooks_at_once_never_share_a_version(tmp_path):
    need_network()
    with mlflow_server(tmp_path) as address, ThreadPoolExecutor() as pool:
        folders = [tmp_path / "left", tmp_path / "right"]
        jobs = [pool.submit(execute, folder, address) for folder in folders]
        left, right = (versions_shown(job.result()) for job in jobs)
        assert sorted(left + right) == [1, 2, 3, 4]


@pytest.mark.slow
def test_a_server_full_of_other_runs_and_versions_changes_nothing(tmp_path):
    need_network()
    with mlflow_server(tmp_path) as address:
        client = mlflow.MlflowClient(address)
        experiment = client.create_experiment(EXPERIMENT)
        client.create_registered_model(NAME)
        for _ in range(200):
            run = client.create_run(experiment)
            client.log_metric(run.info.run_id, "accuracy", 1.0)
            for _ in range(2):
                client.create_model_version(NAME, run.info.artifact_uri, run.info.run_id)
        assert versions_shown(execute(tmp_path / "notebook", address)) == [401, 402]


def in_a_run(address, act):
    """Start a thread that acts as soon as the server has a run that is running."""
    client = mlflow.MlflowClient(address)
    experiment = client.get_experiment_by_name(EXPERIMENT).experiment_id
    status = "attributes.status = 'RUNNING'"

    def watch():
        wait_until(lambda: client.search_runs([experiment], status), 60, "no run is running")
        act()

    thread = threading.Thread(target=watch)
    thread.start()
    return thread


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="Windows has no signals to process groups")
def test_after_an_interrupt_or_a_killed_kernel_in_a_run_the_next_execution_is_right(tmp_path):
    need_network()
    address = loopback()
    with mlflow_server(tmp_path, address):
        with kernel(tmp_path / "killed", address) as run:
            run("settings", "define-training")
            watch = in_a_run(address, lambda: os.kill(run.pid, signal.SIGKILL))
            with pytest.raises(DeadKernelError):
                run("run-lbfgs", "run-lbfgs")
            watch.join()
        mlflow.MlflowClient(address).set_terminated(
            mlflow.MlflowClient(address).search_runs(["1"])[0].info.run_id, "KILLED"
        )
        with kernel(tmp_path / "interrupted", address) as run:
            run("settings", "define-training")
            watch = in_a_run(address, lambda: os.killpg(os.getpgid(run.pid), signal.SIGINT))
            with pytest.raises(CellExecutionError, match="KeyboardInterrupt"):
                run("run-lbfgs", "run-lbfgs")
            watch.join()
            versions_shown(run())


@pytest.mark.slow
def test_a_server_that_is_lost_is_named_within_seconds_and_has_kept_what_was_logged(tmp_path):
    need_network()
    with kernel(tmp_path, address := loopback()) as run:
        with mlflow_server(tmp_path, address):
            run("settings", "define-training")
        shown = refusal(run, "run-lbfgs")
        assert "127.0.0.1" in shown and "Connection refused" in shown
        with mlflow_server(tmp_path, address):
            run("run-lbfgs", "run-newton-cg")
        with mlflow_server(tmp_path, address):
            assert versions_shown(run("compare-runs")) == [1, 2]
