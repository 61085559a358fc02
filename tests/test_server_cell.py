"""The cells that find, start and wait for the server, met with every neighbour they may find."""

import os
import signal
import socket
import sqlite3
import threading
import time
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer

import psutil
import pytest
import requests
from conftest import answers, free_port, kernel, mlflow_server, output, wait_until
from nbclient.exceptions import CellExecutionError


def server_of(port):
    """Return the process that listens on the port of the loopback interface, or None."""
    for process in psutil.process_iter(["name"]):
        try:
            if any(c.laddr.port == port for c in process.net_connections() if c.status == "LISTEN"):
                return process
        except psutil.Error:
            pass
    return None


@contextmanager
def forbidding_server(port=0):
    """A program that answers 403 to everything, as AirPlay does on a Mac."""

    class Forbid(BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_error(403)

        def log_message(self, *args):
            pass

    with HTTPServer(("127.0.0.1", port), Forbid) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield server.server_port
        finally:
            server.shutdown()
            thread.join()


@contextmanager
def silent_server():
    """A program that accepts connections and says nothing."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server.getsockname()[1]


def start(run):
    """Run the cells that find, start and wait for the server; return the notebook."""
    run("settings", "import-libraries")
    return run("wait-for-server", "wait-for-server")


def refusal(folder, **env):
    """Run the notebook up to its server cell; return the error's message and its seconds."""
    with kernel(folder, **env) as run:
        run("settings", "ask-server")
        started = time.monotonic()
        with pytest.raises(CellExecutionError) as error:
            run("find-server", "find-server")
        return str(error.value.evalue), time.monotonic() - started


def test_where_nothing_listens_it_starts_a_server_that_ends_with_the_kernel(tmp_path):
    port = free_port()
    address = f"http://127.0.0.1:{port}"
    with kernel(tmp_path, MLFLOW_TRACKING_URI=address) as run:
        notebook = start(run)
        assert address in output(notebook, "wait-for-server")
        server = server_of(port)
        listening = {c.laddr.ip for c in server.net_connections() if c.status == "LISTEN"}
        assert listening == {"127.0.0.1"}
        foreign = requests.get(
            f"{address}/api/2.0/mlflow/experiments/search?max_results=1",
            headers={"Host": "mlflow.invalid"},
            timeout=5,
        )
        assert foreign.status_code == 403
        assert (tmp_path / "mlflow.db").is_file()

        with kernel(tmp_path / "another folder", MLFLOW_TRACKING_URI=address) as second:
            start(second)
        assert server.is_running() and answers(f"{address}/health"), (
            "a second kernel stopped the server"
        )
    wait_until(lambda: not server.is_running(), 10, lambda: "the server outlives its kernel")
    assert server_of(port) is None


def test_it_uses_a_running_mlflow_ui(tmp_path):
    with mlflow_server(tmp_path, command=["ui", "--workers", "1"]) as address:
        with kernel(tmp_path / "notebook", MLFLOW_TRACKING_URI=address) as run:
            start(run)
        assert answers(f"{address}/health")
    assert not (tmp_path / "notebook" / "mlflow.db").exists()


@pytest.mark.parametrize("address", ["http://mlflow.invalid:5000", "https://127.0.0.1:{}"])
def test_where_no_server_answers_or_can_be_started_is_said_within_five_seconds(tmp_path, address):
    address = address.format(free_port())
    message, seconds = refusal(tmp_path, MLFLOW_TRACKING_URI=address)
    assert f"MLFLOW_TRACKING_URI={address}. Start it, correct the address" in message
    assert seconds < 5


@pytest.mark.parametrize("program", [forbidding_server, silent_server])
def test_a_given_address_of_another_program_is_refused_within_five_seconds(tmp_path, program):
    with program() as port:
        message, seconds = refusal(tmp_path, MLFLOW_TRACKING_URI=f"http://127.0.0.1:{port}")
    assert "MLFLOW_TRACKING_URI" in message
    assert seconds < 5


def test_if_port_5000_belongs_to_another_program_it_says_so_and_takes_the_next(tmp_path):
    if server_of(5000) or server_of(5001):
        pytest.skip("a program of somebody else's listens on port 5000 or 5001")
    with forbidding_server(5000), kernel(tmp_path, MLFLOW_TRACKING_URI=None) as run:
        notebook = run("settings", "find-server")
    assert output(notebook, "find-server") == (
        "http://127.0.0.1:5000 belongs to another program.\n"
        "Tracking server: http://127.0.0.1:5001\n"
    )


def test_if_the_server_dies_while_starting_the_error_shows_the_end_of_its_log(tmp_path):
    with sqlite3.connect(tmp_path / "mlflow.db") as database:  # as of an unknown, later MLflow
        database.execute("CREATE TABLE alembic_version (version_num TEXT)")
        database.execute("INSERT INTO alembic_version VALUES ('later')")
    address = f"http://127.0.0.1:{free_port()}"
    with (
        kernel(tmp_path, MLFLOW_TRACKING_URI=address) as run,
        pytest.raises(CellExecutionError) as error,
    ):
        start(run)
    assert address in error.value.evalue
    assert "Can't locate revision identified by 'later'" in error.value.evalue


def test_a_leftover_mlruns_folder_does_no_harm(tmp_path):
    (tmp_path / "mlruns" / "0").mkdir(parents=True)
    (tmp_path / "mlruns" / "0" / "meta.yaml").write_text("experiment_id: '0'\nname: Default\n")
    with kernel(tmp_path, MLFLOW_TRACKING_URI=f"http://127.0.0.1:{free_port()}") as run:
        assert "answers" in output(start(run), "wait-for-server")


def test_without_requirements_txt_it_stops_at_once_and_says_what_to_do(tmp_path):
    with kernel(tmp_path) as run:
        (tmp_path / "requirements.txt").unlink()
        with pytest.raises(CellExecutionError, match="Put it beside the notebook"):
            run("settings", "settings")


def test_if_a_server_that_it_found_is_gone_when_it_is_needed_the_error_says_so(tmp_path):
    address = f"http://127.0.0.1:{(port := free_port())}"
    with kernel(tmp_path / "notebook", MLFLOW_TRACKING_URI=address) as run:
        with mlflow_server(tmp_path, port):
            run("settings", "import-libraries")
        with pytest.raises(CellExecutionError, match=f"No MLflow server answers at {address}"):
            run("wait-for-server", "wait-for-server")


@pytest.mark.skipif(os.name == "nt", reason="Windows has no signals to a process group")
def test_an_interrupt_while_the_server_boots_does_not_end_it(tmp_path):
    port = free_port()
    with kernel(tmp_path, MLFLOW_TRACKING_URI=f"http://127.0.0.1:{port}") as run:
        run("settings", "start-server")
        (server,) = psutil.Process(run.pid).children()
        os.killpg(os.getpgid(run.pid), signal.SIGINT)  # what Jupyter's stop button does
        notebook = start(run)  # Run All, while the server is booting
        assert "answers" in output(notebook, "wait-for-server")
        assert psutil.Process(run.pid).children() == [server]
