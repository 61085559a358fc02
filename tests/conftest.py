"""A real MLflow server for nbval and for the tests, and a way to execute the notebook once more.

`pytest` at the root runs nbval over project.ipynb first: that is the first execution against the
server, and what the ordinary tests then look at.
"""

import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import mlflow
import nbformat
import psutil
import pytest
import requests
from nbclient import NotebookClient

ROOT = Path(__file__).parent.parent
LEAN_SERVER = ["server", "--workers", "1"]


def free_port():
    """Return a TCP port of the loopback interface that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def wait_until(condition, seconds, what):
    """Wait until the condition is true; fail with the words in `what` after so many seconds."""
    end = time.monotonic() + seconds
    while not (result := condition()):
        assert time.monotonic() < end, f"After {seconds} s: {what()}"
        time.sleep(0.1)
    return result


def answers(url):
    """Return whether something answers at the URL, and not with an error."""
    try:
        return requests.get(url, timeout=5).ok
    except requests.RequestException:
        return False


@contextmanager
def running(command, url, log, **options):
    """Run a server until the end of the block, which begins when the server answers at the URL.

    Its output goes to the file `log`, and into the error if it ends or is not up in two minutes.
    `options` are those of subprocess.Popen.
    """
    with log.open("w") as file:
        process = subprocess.Popen(
            command, stdout=file, stderr=subprocess.STDOUT, start_new_session=True, **options
        )
    end = time.monotonic() + 120
    try:
        while not answers(url):
            assert process.poll() is None and time.monotonic() < end, log.read_text()
            time.sleep(0.1)
        yield process
    finally:
        with suppress(psutil.NoSuchProcess):  # it has ended already
            parent = psutil.Process(process.pid)
            for member in [parent, *parent.children(recursive=True)]:
                member.terminate()  # MLflow 2 does not end its own workers
        process.wait(timeout=30)


@contextmanager
def mlflow_server(folder, port=None, command=LEAN_SERVER, python=sys.executable):
    """Run a real MLflow server with its store in `folder`; give its address; stop it at the end."""
    address = f"http://127.0.0.1:{port or free_port()}"
    with running(
        [python, "-m", "mlflow", *command, "--port", address.split(":")[-1]],
        f"{address}/health",
        folder / "server.log",
        cwd=folder,
        env=os.environ | {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"},
    ):
        yield address


@contextmanager
def kernel(folder, **env):
    """Start a kernel in `folder` beside copies of the notebook and of requirements.txt.

    Gives `run(first, last)`, which executes the cells from one id to another (by default: all) and
    returns the notebook. `env` adds to the kernel's environment; None takes a variable out of it.
    The kernel, process `run.pid`, is shut down at the end, as Jupyter does it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copy(ROOT / "requirements.txt", folder)
    notebook = nbformat.read(ROOT / "project.ipynb", as_version=4)
    positions = {cell.id: i for i, cell in enumerate(notebook.cells)}
    client = NotebookClient(
        notebook,
        kernel_name="python3",
        timeout=300,
        coalesce_streams=True,
        resources={"metadata": {"path": folder}},
    )

    def run(first="title", last="closing"):
        for i in range(positions[first], positions[last] + 1):
            client.execute_cell(notebook.cells[i], i)
        return notebook

    variables = {key: value for key, value in (os.environ | env).items() if value is not None}
    with client.setup_kernel(env=variables):
        run.pid = client.km.provisioner.pid
        yield run


def execute(folder, **env):
    """Execute the whole notebook in a kernel of its own; return it with its outputs."""
    with kernel(folder, **env) as run:
        return run()


def output(notebook, cell_id):
    """Return the text that a cell printed or showed, without what it wrote to standard error."""
    cell = next(cell for cell in notebook.cells if cell.id == cell_id)
    return "".join(
        o.get("text") or o["data"]["text/plain"] for o in cell.outputs if o.get("name") != "stderr"
    )


def pytest_configure(config):
    config.option.nbval = True
    config.option.nbval_sanitize_with = str(ROOT / "tests" / "sanitize.cfg")
    config.addinivalue_line(
        "markers", "slow: needs minutes, or installs something; .ci/run runs it"
    )
    if not config.option.markexpr:
        config.option.markexpr = "not slow"


def pytest_sessionstart(session):
    """Start the server that nbval's kernel and the tests use: nbval takes no fixtures."""
    session.config.stack = ExitStack()
    if session.config.option.collectonly:
        return
    folder = Path(session.config.stack.enter_context(tempfile.TemporaryDirectory()))
    os.environ["MLFLOW_DISABLE_TELEMETRY"] = "true"  # the tests call this machine alone
    os.environ["MLFLOW_TRACKING_URI"] = session.config.stack.enter_context(mlflow_server(folder))


def pytest_sessionfinish(session):
    session.config.stack.close()


@pytest.fixture(scope="session")
def client():
    """A client of the server, after the notebook was executed: by nbval, or here if nbval was not
    asked to."""
    client = mlflow.MlflowClient(os.environ["MLFLOW_TRACKING_URI"])
    if not client.search_registered_models():
        with tempfile.TemporaryDirectory() as folder:
            execute(Path(folder))
    return client
