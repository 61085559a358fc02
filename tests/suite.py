"""The pytest plugin of this project, and what its tests share: servers, and the notebook with edits.

.pytest.ini loads it once, whatever is named. It starts one MLflow server for all that need one.
"""

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from tempfile import TemporaryDirectory

import mlflow
import nbformat
import pytest
import requests
from mlflow.exceptions import MlflowException
from nbclient import NotebookClient
from nbval.plugin import IPyNbCell

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = Path(sys.executable).parent  # of the tests' environment: mlflow, uv, jupyter

for name in [name for name in os.environ if name.startswith(("MLFLOW_", "AWS_"))]:
    del os.environ[name]  # a team's variables must not lead these tests into its stores
os.environ["MLFLOW_DISABLE_TELEMETRY"] = "true"  # the tests call this machine alone
os.environ["NO_PROXY"] = os.environ["no_proxy"] = "127.0.0.1,localhost"


def free_port():
    """Return the number of a port at which nobody listens."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@contextmanager
def running(command, url, log, **options):
    """Run a server, with Popen's `options`, during the block, which begins when the URL answers.

    Its output goes to the file `log`, and into the error if it ends or is not up in two minutes.
    """
    with log.open("w") as output:
        process = subprocess.Popen(
            command, start_new_session=True, stdout=output, stderr=output, **options
        )
    try:
        end, answered = time.monotonic() + 120, False
        while not answered:
            assert process.poll() is None and time.monotonic() < end, log.read_text()
            time.sleep(0.1)
            with suppress(requests.RequestException):
                answered = requests.get(url, timeout=5).ok
        yield process
    finally:
        with suppress(ProcessLookupError):  # it has ended already
            os.killpg(process.pid, signal.SIGTERM)
        process.wait(timeout=30)


@contextmanager
def mlflow_server(**env):
    """Run an MLflow server with its records in a folder of its own; give its address."""
    port = str(free_port())
    command = [sys.executable, "-m", "mlflow", "server", "--port", port]
    env = os.environ | {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"} | env
    address = f"http://127.0.0.1:{port}"
    with TemporaryDirectory() as folder:
        log, command = Path(folder, "server.log"), [*command, "--workers", "1"]
        with running(command, f"{address}/health", log, cwd=folder, env=env):
            yield address


@contextmanager
def answering(status):
    """Answer every request with one HTTP status; give the address and the Authorizations heard."""
    heard = []

    class Program(BaseHTTPRequestHandler):
        def do_GET(self):
            heard.append(self.headers["Authorization"])
            self.send_error(status)

        do_POST = do_GET

        def log_message(self, *_):
            pass

    with HTTPServer(("127.0.0.1", 0), Program) as program:
        threading.Thread(target=program.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{program.server_port}", heard
        program.shutdown()


SHORT = {
    "see-guess": ""
}  # an edit: no guess, which takes seconds and which nothing needs


def read_notebook():
    """Return project.ipynb as it is saved."""
    return nbformat.read(ROOT / "project.ipynb", as_version=4)


def execute(folder, edits=(), until=None, add=(), **env):
    """Execute project.ipynb in `folder`, edited, to the cell of the id `until`; return it.

    `edits` maps a cell's id to its new source, or to an (old, new) pair of texts, of which the old
    one must be there; `add` are the sources of further cells, added-1 and so on. `env` adds to the kernel's
    variables; None takes one out. Raises nbclient's CellExecutionError where a cell fails.
    """
    notebook = read_notebook()
    cells = {cell.id: cell for cell in notebook.cells}
    for cell_id, edit in dict(edits).items():
        if isinstance(edit, tuple):
            assert edit[0] in cells[cell_id].source, f"{cell_id} has no {edit[0]!r}"
            edit = cells[cell_id].source.replace(*edit)
        cells[cell_id].source = edit
    if until:
        del notebook.cells[notebook.cells.index(cells[until]) + 1 :]
    for number, source in enumerate(add, start=1):
        notebook.cells.append(nbformat.v4.new_code_cell(source, id=f"added-{number}"))
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copy(ROOT / "requirements.txt", folder)
    variables = {**os.environ, "PYTEST_CURRENT_TEST": None, **env}
    variables = {name: value for name, value in variables.items() if value is not None}
    where = {"metadata": {"path": str(folder)}}
    client = NotebookClient(notebook, timeout=300, resources=where)
    return client.execute(env=variables)


def shown(notebook, cell_id):
    """Return as text what a cell has put out, without the error stream."""
    (outputs,) = [cell.outputs for cell in notebook.cells if cell.id == cell_id]
    texts = [
        out.get("text") or out.get("data", {}).get("text/plain", "")
        for out in outputs
        if out.get("name") != "stderr"
    ]
    return "".join(texts)


def commands(title, language="bash"):
    """Return the blocks of code under a heading of README, or in a folded part, of this title."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    part = re.split(r"(?m)^(?:## |<summary><b>)", text)
    (part,) = [p for p in part if p.startswith(title)]
    return re.findall(rf"(?ms)^```{language}\n(.*?)^```", part)


def pytest_configure(config):
    """Run slow tests if somebody names them: -m "not slow" stands in .pytest.ini."""
    named = {ROOT / arg.split("::")[0] for arg in config.args}
    everything = {ROOT, ROOT / "tests", ROOT / "project.ipynb"}
    if config.option.markexpr == "not slow" and not named <= everything:
        config.option.markexpr = ""


@pytest.hookimpl(tryfirst=True)
def pytest_collection_finish(session):
    """Put the notebook first, and all its cells if one was chosen: they need those before."""
    cells = [item for item in session.items if isinstance(item, IPyNbCell)]
    others = [item for item in session.items if item not in cells]
    session.items[:] = [*(cells[0].parent.collect() if cells else []), *others]


@pytest.hookimpl(wrapper=True)
def pytest_runtestloop(session):
    """Hold the server around all tests, if one of them needs it; end it on SIGTERM as well."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    items = session.items
    if session.config.option.collectonly or not any(
        isinstance(item, IPyNbCell) or "server" in item.fixturenames for item in items
    ):
        return (yield)
    with mlflow_server() as os.environ["MLFLOW_TRACKING_URI"]:
        return (yield)


@pytest.fixture(scope="session")
def server():
    """The address of the server around all tests."""
    return os.environ["MLFLOW_TRACKING_URI"]


@pytest.fixture(scope="session")
def client(server, tmp_path_factory):
    """A client of that server, where nbval has executed the notebook; if it hasn't, this does."""
    client = mlflow.MlflowClient(server)
    with suppress(MlflowException):
        client.get_model_version_by_alias("tracking_quick_start", "champion")
        return client
    execute(tmp_path_factory.mktemp("notebook"))
    return client
