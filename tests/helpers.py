"""Real servers, kernels and commands for the tests: each ends what it started."""

import os
import re
import shutil
import socket
import subprocess
import sys
import time
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path

import nbformat
import psutil
import pytest
import requests
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError

ROOT = Path(__file__).parent.parent
NAME = "tracking_quick_start"
EXPERIMENT = "mlflow quickstart"
LEAN = ["server", "--workers", "1", "--backend-store-uri", "sqlite:///mlflow.db"]
SCRIPTS = Path(sys.executable).parent  # of the environment that runs the tests: uv, jupyter, ruff


def need(condition, reason):
    """Skip the test, saying why, where the machine lacks something."""
    if not condition:
        pytest.skip(reason)


def need_network():
    """Skip the test where uv cannot build the environment that the notebook needs."""
    need(online(), "no network: uv cannot build an environment")


@cache
def online():
    """Return whether uv can build the environment of requirements.txt, which it then has cached."""
    command = [sys.executable, "-m", "uv", "run", "-q", "--isolated", "--no-project", "--python"]
    command += [sys.executable, "--with-requirements", ROOT / "requirements.txt", "python", "-V"]
    done = subprocess.run(command, check=False, capture_output=True)
    return done.returncode == 0


def free_port():
    """Return a TCP port of the loopback interface that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def loopback():
    """Return an address of this machine at which nobody listens."""
    return f"http://127.0.0.1:{free_port()}"


def wait_until(condition, seconds, what):
    """Return the condition's first true result; fail with the text `what` after so many seconds."""
    end = time.monotonic() + seconds
    while not (result := condition()):
        assert time.monotonic() < end, f"After {seconds} s: {what}"
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
                with suppress(psutil.NoSuchProcess):
                    member.terminate()  # MLflow 2 does not end its own workers
        process.wait(timeout=30)


@contextmanager
def mlflow_server(folder, address=None, command=LEAN):
    """Run a real MLflow server with its store in `folder`; give its address; stop it at the end."""
    address = address or loopback()
    with running(
        [sys.executable, "-m", "mlflow", *command, "--port", address.split(":")[-1]],
        f"{address}/health",
        folder / "server.log",
        cwd=folder,
        env=os.environ | {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"},
    ):
        yield address


def notebook():
    """Return project.ipynb as it is saved."""
    return nbformat.read(ROOT / "project.ipynb", as_version=4)


@contextmanager
def kernel(folder, address, saved=None, **env):
    """Start a kernel in `folder` beside requirements.txt, with this MLFLOW_TRACKING_URI.

    Gives `run(first, last)`, which executes the cells from one id to another (by default: all) and
    returns the notebook: `saved`, or a copy of project.ipynb. `env` adds to the kernel's
    environment; None takes a variable out of it, and an address of None leaves the choice to the
    notebook. `run.add(source)` runs a cell of the reader's own and returns what it shows. The
    kernel, process `run.pid`, is shut down at the end, as Jupyter does it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copy(ROOT / "requirements.txt", folder)
    saved = saved or notebook()
    positions = {cell.id: i for i, cell in enumerate(saved.cells)}
    client = NotebookClient(
        saved,
        kernel_name="python3",
        timeout=300,
        coalesce_streams=True,
        resources={"metadata": {"path": folder}},
    )

    def run(first="title", last="closing"):
        for i in range(positions[first], positions[last] + 1):
            client.execute_cell(saved.cells[i], i)
        return saved

    def add(source):
        saved.cells.append(nbformat.v4.new_code_cell(source, id="added"))
        client.execute_cell(saved.cells[-1], len(saved.cells) - 1)
        return shown(saved.cells.pop())

    run.add, run.notebook = add, saved
    # ipykernel leaves what child processes print out of the cells where it sees pytest's variable.
    variables = os.environ | env | {"MLFLOW_TRACKING_URI": address, "PYTEST_CURRENT_TEST": None}
    variables = {key: value for key, value in variables.items() if value is not None}
    with client.setup_kernel(env=variables):
        run.pid = client.km.provisioner.pid
        yield run


def execute(folder, address, saved=None, **env):
    """Execute the whole notebook in a kernel of its own; return it with its outputs."""
    with kernel(folder, address, saved, **env) as run:
        return run()


def cell(notebook, cell_id):
    """Return the cell with this id."""
    return next(cell for cell in notebook.cells if cell.id == cell_id)


def shown(cell, stderr=False):
    """Return the text that a cell printed or showed, and if asked for, its errors, uncoloured."""
    texts = []
    for out in cell.outputs:
        if stderr or out.get("name") != "stderr":
            texts.append(out.get("text") or out.get("data", {}).get("text/plain", ""))
            texts.extend(out.get("traceback", []) if stderr else [])
    return re.sub(r"\x1b\[[\d;]*m", "", "".join(texts))


def output(notebook, cell_id):
    """Return the text that a cell printed or showed, without what it wrote to standard error."""
    return shown(cell(notebook, cell_id))


def refusal(run, cell_id):
    """Run a cell that must end in an error; return all that it shows."""
    with pytest.raises(CellExecutionError):
        run(cell_id, cell_id)
    return shown(cell(run.notebook, cell_id), stderr=True)


def text_of(document):
    """Return the text of a file of the project; of a notebook, that of its Markdown cells."""
    if document.endswith(".ipynb"):
        cells = [cell for cell in notebook().cells if cell.cell_type == "markdown"]
        return "\n\n".join(cell.source for cell in cells)
    return (ROOT / document).read_text(encoding="utf-8")


def section(document, title):
    """Return what stands under a heading, or in the folded part with this summary."""
    text = text_of(document)
    folded = re.search(
        rf"<summary>[^\n]*{re.escape(title)}.*?</summary>(.*?)</details>", text, re.DOTALL
    )
    heading = re.search(
        rf"^##+ [^\n]*{re.escape(title)}[^\n]*\n(.*?)(?=^##? |\Z)", text, re.DOTALL | re.MULTILINE
    )
    found = heading or folded
    assert found, f"{document} has no part {title!r}"
    return found[1]


def commands(document, title, language="bash"):
    """Return the blocks of code under a heading, or in a folded part, in their order."""
    return re.findall(
        rf"^ *```{language}\n(.*?)^ *```", section(document, title), re.DOTALL | re.MULTILINE
    )


def shell(command, folder, env=None):
    """Run a command as a reader would, who has uv, in a folder; return what it printed."""
    env = dict(env or os.environ)
    env["PATH"] = f"{env['PATH']}{os.pathsep}{SCRIPTS}"
    command = ["bash", "-ec", command]
    return subprocess.run(
        command, cwd=folder, env=env, check=True, stdout=subprocess.PIPE, text=True
    ).stdout
