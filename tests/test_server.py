"""The server that the notebook starts for itself, and the one that its reader names."""

import json
import os
import signal
import socket
import sqlite3
import threading
import time
from contextlib import ExitStack, contextmanager
from types import SimpleNamespace

import helpers
import mlflow
import psutil
import pytest
from helpers import kernel, loopback, mlflow_server, output, refusal
from sklearn.datasets import load_iris
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


def connect(cells):
    """Run the cells that start and await the server; return the address that it logs to."""
    cells("start-server", "import-libraries")
    cells("connect", "connect")
    return output(cells.notebook, "connect").split()[-1]


def no_answer(folder, address, **env):
    """Return what the first cell that needs the server shows, and after how many seconds."""
    with kernel(folder, address, **env) as cells:
        cells("start-server", "import-libraries")
        started = time.monotonic()
        return refusal(cells, "connect"), time.monotonic() - started


def experiments(address):
    return sorted(e.name for e in mlflow.MlflowClient(address).search_experiments())


def server_of(cells):
    """Return the processes that the kernel has started, and theirs."""
    return psutil.Process(cells.pid).children(recursive=True)


def answers(address):
    """Return what versions 1 and 2 in the registry at this address say of the 150 flowers."""
    mlflow.set_tracking_uri(address)
    flowers = load_iris(as_frame=True).data
    uris = [f"models:/{helpers.NAME}/{version}" for version in (1, 2)]
    return [list(mlflow.pyfunc.load_model(uri).predict(flowers)) for uri in uris]


@pytest.fixture(scope="module")
def own(tmp_path_factory):
    """The notebook executed twice on its own server, while a team's variables are exported."""
    folder = tmp_path_factory.mktemp("own") / "Mappe mit Wörtern 花"
    (decoy := folder / "decoy").mkdir(parents=True)
    (mlruns := folder / "notebook" / "mlruns" / "0").mkdir(parents=True)
    (mlruns / "meta.yaml").write_text("experiment_id: '0'\nname: Default\n")
    stores = ["BACKEND_STORE_URI", "REGISTRY_STORE_URI", "REGISTRY_URI"]
    team = {name: f"sqlite:///{decoy / name}.db" for name in stores}
    team |= dict.fromkeys(
        ["ARTIFACTS_DESTINATION", "DEFAULT_ARTIFACT_ROOT"], decoy.as_uri()
    )
    team |= {"HOST": "0.0.0.0", "APP_NAME": "basic-auth", "STATIC_PREFIX": "/team"}
    team = {f"MLFLOW_{name}": value for name, value in team.items()}
    with kernel(folder / "notebook", None, **team) as cells:
        cells()
        address = output(cells.notebook, "connect").split()[-1]
        connections = [c for p in server_of(cells) for c in p.net_connections()]
        before = answers(address)
        again = cells()
        yield SimpleNamespace(
            address=address,
            client=mlflow.MlflowClient(address),
            listening={c.laddr for c in connections if c.status == "LISTEN"},
            folder=folder / "notebook",
            decoy=decoy,
            before=before,
            again=again,
        )


@not_windows
def test_only_this_machine_reaches_its_own_server_whatever_host_is_exported(own):
    assert own.listening == {("127.0.0.1", int(helpers.port_of(own.address)))}


def test_its_database_is_beside_the_notebook_whatever_store_is_exported(own):
    with sqlite3.connect(own.folder / "mlflow.db") as database:
        names = database.execute("SELECT name FROM registered_models").fetchall()
    assert names == [(helpers.NAME,)]
    assert [path.name for path in own.decoy.iterdir()] == []


def test_its_models_are_beside_the_notebook_whatever_destination_is_exported(own):
    assert list((own.folder / "mlartifacts").rglob("model.skops"))
    assert list((own.folder / "mlartifacts").rglob("confusion_matrix.png"))


def test_its_registry_is_its_own_whatever_registry_is_exported(own):
    assert own.client.get_model_version(helpers.NAME, "1").run_id


def test_run_all_again_adds_two_versions_and_leaves_the_first_two_as_they_were(own):
    for name in ["compare-runs", "reload-models", "use-champion"]:
        assert output(own.again, name) == output(helpers.notebook(), name)
    assert output(own.again, "promote").splitlines() == [
        "before: {'champion': '2'}",
        "after:  {'champion': '4'}",
    ]
    rows = [line.split() for line in output(own.again, "list-versions").splitlines()]
    assert [row[1] for row in rows[1:]] == ["3", "4"]
    assert answers(own.address) == own.before


def test_it_leaves_its_database_its_files_and_its_log_and_nothing_else(own):
    made = {
        "requirements.txt",
        "mlruns",
        "mlflow.db",
        "mlartifacts",
        "mlflow-server.log",
    }
    assert {path.name for path in own.folder.iterdir()} == made


@not_windows
def test_an_interrupt_spares_it_a_death_is_mended_and_it_ends_with_the_kernel(tmp_path):
    with kernel(tmp_path, None, MLFLOW_HTTP_REQUEST_MAX_RETRIES="1") as cells:
        cells("start-server", "start-server")
        first = server_of(cells)
        os.killpg(
            os.getpgid(cells.pid), signal.SIGINT
        )  # what Jupyter's stop button does
        cells("start-server", "run-lbfgs")
        assert {p.pid for p in first} <= {p.pid for p in server_of(cells)}
        for process in (killed := server_of(cells)):
            process.kill()
        assert cells.add("server.wait()") == "-9"
        assert psutil.wait_procs(killed, timeout=10)[1] == []  # its workers too
        shown = refusal(cells, "run-newton-cg")
        assert "Connection refused" in shown
        cells("start-server", "run-lbfgs")
        assert "is version 2" in output(cells.notebook, "run-lbfgs")  # nothing was lost
        second = server_of(cells)
    gone, alive = psutil.wait_procs(second, timeout=10)
    assert gone and not alive, "the server outlives its kernel"


@pytest.mark.slow
def test_two_notebooks_in_two_folders_keep_their_records_apart(tmp_path):
    with ExitStack() as stack:
        notebooks = [stack.enter_context(kernel(tmp_path / n, None)) for n in "ab"]
        for cells in notebooks:
            cells("start-server", "start-server")
        for cells in notebooks:
            cells("import-libraries", "run-lbfgs")
            assert "is version 1" in output(cells.notebook, "run-lbfgs")


@pytest.mark.slow
def test_two_notebooks_at_once_in_one_folder_both_end_if_the_error_is_heeded(tmp_path):
    with ExitStack() as stack:
        notebooks = [stack.enter_context(kernel(tmp_path, None)) for _ in "ab"]
        for cells in notebooks:
            cells("start-server", "start-server")  # both make the same new database
        for cells in notebooks:
            cells("import-libraries", "split-data")
            try:
                cells("connect", "connect")
            except helpers.CellExecutionError:
                shown = output(cells.notebook, "connect", stderr=True)
                assert helpers.quoted("first cell")[0] in shown
                try:
                    cells("start-server", "connect")
                except helpers.CellExecutionError:  # both have died, halfway
                    (tmp_path / "mlflow.db").unlink()
                    cells("start-server", "connect")
        for cells in notebooks:
            cells("define-training", "closing")
            assert "'champion': '" in output(cells.notebook, "promote")


def silent_listener():
    """A program that accepts connections and never answers."""
    return socket.create_server(("127.0.0.1", 0))


@pytest.mark.parametrize(
    ("address", "limit"),
    [
        ("http://127.0.0.1:{free}", 10),  # a tunnel that is down
        pytest.param("http://mlflow.invalid:5000", 10, marks=pytest.mark.slow),
        pytest.param("https://127.0.0.1:{free}", 10, marks=pytest.mark.slow),
        pytest.param("http://127.0.0.1:{silent}", 60, marks=pytest.mark.slow),
    ],
)
def test_where_nobody_answers_the_error_names_the_address_and_nothing_is_started(
    tmp_path, address, limit
):
    with silent_listener() as silent:
        ports = {
            "free": helpers.port_of(loopback()),
            "silent": silent.getsockname()[1],
        }
        shown, seconds = no_answer(tmp_path, address.format(**ports))
    assert address.split("/")[2].split(":")[0] in shown.split("MlflowException")[-1]
    assert seconds < limit
    assert [path.name for path in tmp_path.iterdir()] == ["requirements.txt"]


@not_windows
def test_settings_that_the_reader_has_exported_stay(tmp_path):
    theirs = {
        "MLFLOW_HTTP_REQUEST_TIMEOUT": "77",
        "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "4",
        "MLFLOW_LOGGING_LEVEL": "ERROR",
        "MLFLOW_REGISTRY_URI": "http://registry.invalid",
        "NO_PROXY": "capitals.invalid",
    }
    address = "http://mlflow.invalid:5000"
    with kernel(tmp_path, address, no_proxy="small.invalid", **theirs) as cells:
        cells("start-server", "import-libraries")
        kept = json.loads(cells.add("import json; print(json.dumps(dict(os.environ)))"))
    assert {name: kept[name] for name in theirs} == theirs
    hosts = {"127.0.0.1", "small.invalid", "capitals.invalid"}
    assert set(kept["no_proxy"].split(",")) == hosts


@pytest.mark.slow
def test_behind_a_proxy_that_asks_for_a_token_it_runs_with_it_and_logs_nothing_without(
    tmp_path,
):
    with mlflow_server(tmp_path) as address, token_proxy(address) as proxy:
        shown, _ = no_answer(tmp_path / "without", proxy)
        assert "failed with error code 401" in shown
        assert experiments(address) == ["Default"]
        done = helpers.execute(tmp_path / "with", proxy, MLFLOW_TRACKING_TOKEN="secret")
        assert "'champion': '2'" in output(done, "promote")
        assert experiments(address) == ["Default", helpers.EXPERIMENT]


@pytest.mark.slow
def test_a_proxy_that_is_dead_does_not_come_between_the_notebook_and_this_machine(
    tmp_path,
):
    proxy = {name: loopback() for name in ("HTTP_PROXY", "http_proxy")}
    done = helpers.execute(tmp_path, None, **proxy, no_proxy=None, NO_PROXY=None)
    assert "'champion': '2'" in output(done, "promote")


def test_if_the_server_dies_while_starting_the_error_shows_the_end_of_its_log(tmp_path):
    with sqlite3.connect(tmp_path / "mlflow.db") as database:  # of a later MLflow
        database.execute("CREATE TABLE alembic_version (version_num TEXT)")
        database.execute("INSERT INTO alembic_version VALUES ('later')")
    shown, _ = no_answer(tmp_path, None)
    assert helpers.quoted("first cell")[0] in shown
    assert "Can't locate revision identified by 'later'" in shown


@pytest.mark.slow
def test_a_database_that_cannot_be_opened_ends_the_wait_within_a_minute(tmp_path):
    (tmp_path / "mlflow.db").mkdir()
    shown, seconds = no_answer(tmp_path, None)
    assert "unable to open database file" in shown
    assert seconds < 65


@pytest.mark.slow
def test_without_requirements_txt_the_error_names_the_file(tmp_path):
    with kernel(tmp_path, None) as cells:
        cells("start-server", "first-intro")
        (tmp_path / "requirements.txt").unlink()
        assert "requirements.txt" in refusal(cells, "run-lbfgs").splitlines()[-1]
