"""The cells that find, start and await the server, met with every neighbour they may find."""

import os
import signal
import socket
import sqlite3
import threading
import time
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import mlflow
import psutil
import pytest
import requests
from helpers import (
    EXPERIMENT,
    answers,
    execute,
    kernel,
    loopback,
    mlflow_server,
    need,
    need_network,
    output,
    refusal,
    wait_until,
)

windows = pytest.mark.skipif(os.name == "nt", reason="Windows has no signals to process groups")


def server_of(address):
    """Return the process that listens at an address of this machine, or None."""
    port = int(address.rsplit(":", 1)[1])
    for process in psutil.process_iter():
        try:
            for connection in process.net_connections():
                if connection.status == "LISTEN" and connection.laddr.port == port:
                    return process
        except psutil.Error:
            pass
    return None


@contextmanager
def web_server(get, address=None):
    """Serve HTTP at an address of this machine: `get(request)` answers to every method."""

    class Handler(BaseHTTPRequestHandler):
        do_GET = do_POST = do_PUT = do_PATCH = do_DELETE = lambda self: get(self)

        def log_message(self, *args):
            pass

    address = address or loopback()
    with ThreadingHTTPServer(("127.0.0.1", int(address.rsplit(":", 1)[1])), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield address
        finally:
            server.shutdown()
            thread.join()


def forbid(request):
    """Answer 403, as AirPlay does on a Mac."""
    request.send_error(403)


def asks_for_token(address):
    """Return a proxy's answer: the server's at this address, for those who bring the token."""

    def get(request):
        if request.headers["Authorization"] != "Bearer secret":
            return request.send_error(401)
        body = request.rfile.read(int(request.headers.get("Content-Length", 0)))
        headers = {k: v for k, v in request.headers.items() if k not in ("Host", "Authorization")}
        url = f"{address}{request.path}"
        answer = requests.request(request.command, url, data=body, headers=headers, timeout=60)
        request.send_response(answer.status_code)
        request.send_header("Content-Length", str(len(answer.content)))
        for name in {"Content-Type", "Content-Disposition"} & set(answer.headers):
            request.send_header(name, answer.headers[name])
        request.end_headers()
        request.wfile.write(answer.content)

    return get


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
    return [e.name for e in mlflow.MlflowClient(address).search_experiments()]


def test_where_nobody_listens_it_starts_a_server_that_ends_with_the_kernel(tmp_path):
    with kernel(tmp_path, address := loopback()) as run:
        assert address in start(run)
        server = server_of(address)
        listening = {c.laddr.ip for c in server.net_connections() if c.status == "LISTEN"}
        assert listening == {"127.0.0.1"}
        api = f"{address}/api/2.0/mlflow/experiments/search?max_results=1"
        assert requests.get(api, headers={"Host": "mlflow.invalid"}, timeout=5).status_code == 403
        assert {path.name for path in tmp_path.iterdir()} >= {"mlflow.db", "mlflow-server.log"}
        with kernel(tmp_path / "another folder", address) as second:
            start(second)
        assert answers(f"{address}/health"), "a second kernel stopped the server"
    wait_until(lambda: not server.is_running(), 10, "the server outlives its kernel")
    assert server_of(address) is None


def test_its_own_server_keeps_away_from_the_stores_of_a_teams_variables(tmp_path):
    decoy = tmp_path / "decoy"
    decoy.mkdir()
    store, file = f"sqlite:///{decoy / 'team.db'}", decoy.as_uri()
    team = {
        "MLFLOW_BACKEND_STORE_URI": store,
        "MLFLOW_REGISTRY_STORE_URI": store,
        "MLFLOW_REGISTRY_URI": store,
        "MLFLOW_ARTIFACTS_DESTINATION": file,
        "MLFLOW_DEFAULT_ARTIFACT_ROOT": file,
        "MLFLOW_STATIC_PREFIX": "/team",
        "MLFLOW_HOST": "0.0.0.0",
    }
    with kernel(tmp_path / "notebook", address := loopback(), **team) as run:
        run("settings", "run-lbfgs")
        assert mlflow.MlflowClient(address).get_model_version("tracking_quick_start", "1")
    assert list(decoy.iterdir()) == []
    assert list((tmp_path / "notebook" / "mlartifacts").rglob("model.skops"))


def test_it_uses_the_server_that_it_finds_at_port_5000(tmp_path):
    address = "http://127.0.0.1:5000"
    need(not server_of(address), "a program of somebody else's has the port 5000")
    with mlflow_server(tmp_path, address), kernel(tmp_path / "notebook", None) as run:
        assert address in start(run)
        assert not (tmp_path / "notebook" / "mlflow.db").exists()


def test_if_port_5000_belongs_to_another_program_it_takes_the_next_without_a_word(tmp_path):
    first, second = "http://127.0.0.1:5000", "http://127.0.0.1:5001"
    need(not server_of(first) and not server_of(second), "somebody else's program has port 5000")
    with web_server(forbid, first), kernel(tmp_path, None) as run:
        assert start(run) == f"Logging to {second}\n"
        assert output(run.notebook, "find-server") == ""


@pytest.mark.parametrize("address", ["http://mlflow.invalid:5000", "https://127.0.0.1:{}"])
def test_where_no_server_answers_the_error_names_the_address_within_seconds(tmp_path, address):
    address = address.format(loopback().rsplit(":", 1)[1])
    shown, seconds = refused(tmp_path, address)
    assert address.split("/")[2].split(":")[0] in shown.split("MlflowException")[-1]
    assert seconds < 10
    assert not (tmp_path / "mlflow.db").exists(), "it has started a server of its own"


def test_a_given_address_of_another_program_is_refused_within_seconds(tmp_path):
    with web_server(forbid) as address:
        shown, seconds = refused(tmp_path, address)
    assert "failed with error code 403" in shown
    assert seconds < 10


@pytest.mark.slow
def test_a_given_address_that_accepts_and_stays_silent_is_refused_within_a_minute(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as silent:
        address = f"http://127.0.0.1:{silent.getsockname()[1]}"
        shown, seconds = refused(tmp_path, address)
    assert "timed out" in shown
    assert seconds < 60


@pytest.mark.slow
def test_behind_a_proxy_that_asks_for_a_token_it_runs_with_it_and_logs_nothing_without(tmp_path):
    need_network()
    with mlflow_server(tmp_path) as address, web_server(asks_for_token(address)) as proxy:
        shown, _ = refused(tmp_path / "without", proxy)
        assert "failed with error code 401" in shown
        assert experiments(address) == ["Default"]
        notebook = execute(tmp_path / "with", proxy, MLFLOW_TRACKING_TOKEN="secret")
        assert output(notebook, "promote") == "Version 2 is the champion\n"
        assert sorted(experiments(address)) == ["Default", EXPERIMENT]


@pytest.mark.slow
def test_a_proxy_that_is_dead_does_not_come_between_the_notebook_and_this_machine(tmp_path):
    need_network()
    proxy = {name: loopback() for name in ("HTTP_PROXY", "http_proxy")}
    env = proxy | {"no_proxy": None, "NO_PROXY": None}
    notebook = execute(tmp_path, loopback(), **env)
    assert output(notebook, "promote") == "Version 2 is the champion\n"


def test_if_the_server_dies_while_starting_the_error_shows_the_end_of_its_log(tmp_path):
    with sqlite3.connect(tmp_path / "mlflow.db") as database:  # as of an unknown, later MLflow
        database.execute("CREATE TABLE alembic_version (version_num TEXT)")
        database.execute("INSERT INTO alembic_version VALUES ('later')")
    shown, _ = refused(tmp_path, loopback())
    assert "Can't locate revision identified by 'later'" in shown


def test_an_old_mlruns_folder_beside_the_notebook_does_no_harm(tmp_path):
    (tmp_path / "mlruns" / "0").mkdir(parents=True)
    (tmp_path / "mlruns" / "0" / "meta.yaml").write_text("experiment_id: '0'\nname: Default\n")
    with kernel(tmp_path, loopback()) as run:
        assert "Logging to" in start(run)


def test_without_requirements_txt_it_stops_before_anything_is_logged(tmp_path):
    with mlflow_server(tmp_path) as address, kernel(tmp_path / "notebook", address) as run:
        (tmp_path / "notebook" / "requirements.txt").unlink()
        run("settings", "meet-warning")
        assert "No such file or directory: 'requirements.txt'" in refusal(run, "read-lock")
        assert experiments(address) == ["Default"]


@windows
def test_after_an_interrupt_while_the_server_boots_run_all_finds_it_and_starts_no_other(tmp_path):
    with kernel(tmp_path, loopback()) as run:
        run("settings", "start-server")
        (server,) = psutil.Process(run.pid).children()
        os.killpg(os.getpgid(run.pid), signal.SIGINT)  # what Jupyter's stop button does
        assert "Logging to" in start(run)
        assert psutil.Process(run.pid).children() == [server]


@pytest.mark.slow
def test_if_its_own_server_died_run_all_starts_it_again_and_nothing_is_lost(tmp_path):
    need_network()
    with kernel(tmp_path, address := loopback()) as run:
        run("settings", "run-lbfgs")
        server = server_of(address)
        for process in [*psutil.Process(run.pid).children(recursive=True)]:
            process.kill()
        wait_until(lambda: not server.is_running(), 10, "the server is still there")
        shown = refusal(run, "run-newton-cg")
        assert address.rsplit(":", 1)[1] in shown and "Connection refused" in shown
        assert output(run(), "promote") == "Version 3 is the champion\n"
