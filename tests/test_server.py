"""The cells that find, start and await the server, met with every neighbour they may find."""

import os
import signal
import socket
import sqlite3
import sys
import threading
import time
from contextlib import contextmanager

import helpers
import mlflow
import psutil
import pytest
from helpers import FIRST, SECOND, kernel, loopback, mlflow_server, output, refusal
from werkzeug.exceptions import Unauthorized
from werkzeug.middleware.http_proxy import ProxyMiddleware
from werkzeug.serving import make_server

not_windows = pytest.mark.skipif(
    os.name == "nt", reason="Windows knows no groups of processes"
)


@contextmanager
def token_proxy(address):
    """Run a proxy in front of a server, for those who bring the token; give its address."""
    proxy = ProxyMiddleware(Unauthorized(), {"/api/": {"target": address}})

    def app(environ, start_response):
        known = environ.get("HTTP_AUTHORIZATION") == "Bearer secret"
        return (proxy if known else Unauthorized())(environ, start_response)

    server = make_server("127.0.0.1", 0, app, threaded=True)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.port}"
    finally:
        server.shutdown()
        thread.join()


def start(run):
    """Run the cells that find, start and await the server; return what the last one printed."""
    run("settings", "import-libraries")
    return output(run("connect", "connect"), "connect")


def refused(folder, address, **env):
    """Return what the first cell that needs the server shows, and after how many seconds."""
    with kernel(folder, address, **env) as run:
        run("settings", "import-libraries")
        started = time.monotonic()
        return refusal(run, "connect"), time.monotonic() - started


def experiments(address):
    return sorted(e.name for e in mlflow.MlflowClient(address).search_experiments())


@not_windows
def test_where_nobody_listens_it_starts_a_server_that_ends_with_the_kernel(tmp_path):
    (tmp_path / "mlruns" / "0").mkdir(
        parents=True
    )  # an old project's records do no harm
    (tmp_path / "mlruns" / "0" / "meta.yaml").write_text(
        "experiment_id: '0'\nname: Default\n"
    )
    with kernel(tmp_path, address := loopback()) as run:
        assert address in start(run)
        server = psutil.Process(run.pid).children(recursive=True)
        connections = [c for process in server for c in process.net_connections()]
        listening = {c.laddr for c in connections if c.status == "LISTEN"}
        assert listening == {("127.0.0.1", int(helpers.port_of(address)))}
        assert {path.name for path in tmp_path.iterdir()} >= {
            "mlflow.db",
            "mlflow-server.log",
        }
        with kernel(tmp_path / "another folder", address) as second:
            start(second)
        assert helpers.taken(address), "a second kernel stopped the server"
    assert psutil.wait_procs(server, timeout=10)[1] == [], (
        "the server outlives its kernel"
    )


def test_its_own_server_keeps_away_from_the_stores_of_a_teams_variables(tmp_path):
    decoy = tmp_path / "decoy"
    decoy.mkdir()
    store, folder = f"sqlite:///{decoy / 'team.db'}", decoy.as_uri()
    team = {
        "BACKEND_STORE_URI": store,
        "REGISTRY_STORE_URI": store,
        "REGISTRY_URI": store,
    }
    team |= {
        "ARTIFACTS_DESTINATION": folder,
        "DEFAULT_ARTIFACT_ROOT": folder,
        "HOST": "0.0.0.0",
    }
    team = {f"MLFLOW_{key}": value for key, value in team.items()}
    with kernel(tmp_path / "notebook", address := loopback(), **team) as run:
        run("settings", "run-lbfgs")
        assert mlflow.MlflowClient(address).get_model_version(helpers.NAME, "1")
    assert list(decoy.iterdir()) == []
    assert list((tmp_path / "notebook" / "mlartifacts").rglob("model.skops"))


@pytest.mark.slow
def test_without_an_address_it_passes_another_program_by_and_then_finds_its_server(
    tmp_path,
):
    helpers.need_ports()
    command = [sys.executable, "-m", "http.server", "--bind", "127.0.0.1", "5000"]
    other = helpers.running(command, FIRST, tmp_path / "log", cwd=tmp_path)
    with (
        other,
        kernel(tmp_path, None) as run,
        kernel(tmp_path / "second", None) as second,
    ):
        assert start(run) == start(second) == f"Logging to {SECOND}\n"
        assert not (tmp_path / "second" / "mlflow.db").exists()


@pytest.mark.parametrize(
    ("address", "limit"),
    [
        ("http://mlflow.invalid:5000", 10),
        pytest.param("https://127.0.0.1:{free}", 10, marks=pytest.mark.slow),
        pytest.param("http://127.0.0.1:{silent}", 60, marks=pytest.mark.slow),
    ],
)
def test_where_no_server_answers_the_error_names_the_address_in_time(
    tmp_path, address, limit
):
    with socket.create_server(
        ("127.0.0.1", 0)
    ) as silent:  # it accepts, and never answers
        ports = {"free": helpers.port_of(loopback()), "silent": silent.getsockname()[1]}
        shown, seconds = refused(tmp_path, address.format(**ports))
    assert address.split("/")[2].split(":")[0] in shown.split("MlflowException")[-1]
    assert seconds < limit
    assert not (tmp_path / "mlflow.db").exists(), "it has started a server of its own"


@pytest.mark.slow
def test_behind_a_proxy_that_asks_for_a_token_it_runs_with_it_and_logs_nothing_without(
    tmp_path,
):
    with mlflow_server(tmp_path) as address, token_proxy(address) as proxy:
        shown, _ = refused(tmp_path / "without", proxy)
        assert "failed with error code 401" in shown
        assert experiments(address) == ["Default"]
        notebook = helpers.execute(
            tmp_path / "with", proxy, MLFLOW_TRACKING_TOKEN="secret"
        )
        assert output(notebook, "promote") == "Version 2 is the champion\n"
        assert experiments(address) == ["Default", helpers.EXPERIMENT]


@pytest.mark.slow
def test_a_proxy_that_is_dead_does_not_come_between_the_notebook_and_this_machine(
    tmp_path,
):
    proxy = {name: loopback() for name in ("HTTP_PROXY", "http_proxy")}
    notebook = helpers.execute(
        tmp_path, loopback(), **proxy, no_proxy=None, NO_PROXY=None
    )
    assert output(notebook, "promote") == "Version 2 is the champion\n"


def test_if_the_server_dies_while_starting_the_error_shows_the_end_of_its_log(tmp_path):
    with sqlite3.connect(
        tmp_path / "mlflow.db"
    ) as database:  # as of an unknown, later MLflow
        database.execute("CREATE TABLE alembic_version (version_num TEXT)")
        database.execute("INSERT INTO alembic_version VALUES ('later')")
    shown, _ = refused(tmp_path, loopback())
    assert "Can't locate revision identified by 'later'" in shown


@pytest.mark.slow
def test_without_requirements_txt_it_stops_before_it_turns_to_a_server(tmp_path):
    with kernel(tmp_path, "http://mlflow.invalid:5000") as run:
        (tmp_path / "requirements.txt").unlink()
        run("settings", "meet-warning")
        assert "No such file or directory: 'requirements.txt'" in refusal(
            run, "read-lock"
        )


@not_windows
@pytest.mark.slow
def test_its_own_server_outlives_an_interrupt_and_if_it_dies_run_all_starts_it_again(
    tmp_path,
):
    with kernel(tmp_path, address := loopback()) as run:
        run("settings", "start-server")
        first = psutil.Process(run.pid).children()
        os.killpg(os.getpgid(run.pid), signal.SIGINT)  # what Jupyter's stop button does
        run("settings", "run-lbfgs")
        assert (
            psutil.Process(run.pid).children() == first
        )  # it boots on, and no other was started
        for process in psutil.Process(run.pid).children(recursive=True):
            process.kill()
        assert run.add("server.wait()") == "-9"
        shown = refusal(run, "run-newton-cg")
        assert helpers.port_of(address) in shown and "Connection refused" in shown
        assert (
            output(run(), "promote") == "Version 3 is the champion\n"
        )  # nothing was lost
