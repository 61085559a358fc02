"""Real servers, kernels and commands for the tests: each ends what it started."""

import ast
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from contextlib import contextmanager, suppress
from pathlib import Path

import nbformat
import pytest
import requests
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError

ROOT = Path(__file__).resolve().parent.parent
LEAN = ["server", "--workers", "1", "--backend-store-uri", "sqlite:///mlflow.db"]
SCRIPTS = Path(sys.executable).parent  # of the tests' environment: uv, mlflow, ruff


def need(condition, reason):
    """Skip the test, saying why, where the machine lacks something."""
    if not condition:
        pytest.skip(reason)


def loopback():
    """Return an address of this machine at which nobody listens."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{probe.getsockname()[1]}"


def port_of(address):
    """Return the port of an address, as text."""
    return address.rsplit(":", 1)[1]


@contextmanager
def running(command, url, log, **options):
    """Run a server, with Popen's `options`, during the block, which begins when the URL answers.

    Its output goes to the file `log`, and into the error if it ends or is not up in two minutes.
    """
    output = {"stdout": log.open("w"), "stderr": subprocess.STDOUT}
    process = subprocess.Popen(command, start_new_session=True, **output, **options)
    end = time.monotonic() + 120
    try:
        answered = False
        while not answered:
            assert process.poll() is None and time.monotonic() < end, log.read_text()
            time.sleep(0.1)
            with suppress(requests.RequestException):
                answered = requests.get(url, timeout=5).ok
        yield process
    finally:
        with suppress(ProcessLookupError):  # it has ended already
            if os.name == "nt":
                process.terminate()
            else:
                os.killpg(
                    process.pid, signal.SIGTERM
                )  # MLflow 2 does not end its own workers
        process.wait(timeout=30)


@contextmanager
def mlflow_server(folder, address=None):
    """Run a real MLflow server with its store in `folder`; give its address; stop it at the end."""
    address = address or loopback()
    command = [sys.executable, "-m", "mlflow", *LEAN, "--port", port_of(address)]
    env = os.environ | {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
    with running(
        command, f"{address}/health", folder / "server.log", cwd=folder, env=env
    ):
        yield address


@contextmanager
def browser():
    """Run a browser, without a window, that reaches this machine alone."""
    from playwright.sync_api import expect, sync_playwright

    program = shutil.which("chromium") or shutil.which("google-chrome")
    need(program, "no browser on this machine: neither chromium nor google-chrome")
    # root has no sandbox
    flags = ["--no-sandbox", "--disable-gpu", "--disable-background-networking"]
    flags += ["--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.*"]
    expect.set_options(timeout=30_000)  # milliseconds
    with sync_playwright() as playwright:
        yield playwright.chromium.launch(executable_path=program, args=flags)


def notebook():
    """Return project.ipynb as it is saved."""
    return nbformat.read(ROOT / "project.ipynb", as_version=4)


def said(cell_id, pattern):
    """Return what the code of a cell of project.ipynb says where the pattern has its group."""
    found = re.search(pattern, cell(notebook(), cell_id).source)
    assert found, f"cell {cell_id} no longer says {pattern}"
    return found[1]


def passed(source):
    """Return what code passes to train_and_log: the run's name, its parameters, its tag."""
    call = ast.parse(source).body[0].value
    return tuple(ast.literal_eval(argument) for argument in call.args)


@contextmanager
def kernel(folder, address, saved=None, **env):
    """Start a kernel in `folder`, with this MLFLOW_TRACKING_URI; shut it down as Jupyter does it.

    Gives `cells(first, last)`, which executes the cells from one id to another (by default: all)
    and returns the notebook: `saved`, or a copy of project.ipynb. `env` adds to the kernel's
    variables; None takes one out. `cells.add(source)` executes a cell of the reader's own and
    returns what it shows; `cells.pid` is the kernel.
    """
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copy(ROOT / "requirements.txt", folder)
    saved = saved or notebook()
    positions = {cell.id: i for i, cell in enumerate(saved.cells)}
    where = {"metadata": {"path": folder}}
    jupyter = NotebookClient(saved, timeout=300, coalesce_streams=True, resources=where)

    def cells(first="title", last="closing"):
        for i in range(positions[first], positions[last] + 1):
            jupyter.execute_cell(saved.cells[i], i)
        return saved

    def add(source):
        saved.cells = [cell for cell in saved.cells if cell.id != "added"]
        saved.cells.append(nbformat.v4.new_code_cell(source, id="added"))
        jupyter.execute_cell(saved.cells[-1], len(saved.cells) - 1)
        return output(saved, "added")

    cells.add, cells.notebook = add, saved
    # ipykernel leaves what child processes print out of the cells where it sees pytest's variable.
    variables = (
        os.environ | env | {"MLFLOW_TRACKING_URI": address, "PYTEST_CURRENT_TEST": None}
    )
    variables = {name: value for name, value in variables.items() if value is not None}
    with jupyter.setup_kernel(env=variables):
        cells.pid = jupyter.km.provisioner.pid
        yield cells


def execute(folder, address, saved=None, **env):
    """Execute the whole notebook in a kernel of its own; return it with its outputs."""
    with kernel(folder, address, saved, **env) as cells:
        return cells()


def cell(notebook, cell_id):
    """Return the cell with this id."""
    return next(cell for cell in notebook.cells if cell.id == cell_id)


def output(notebook, cell_id, stderr=False):
    """Return what a cell printed or showed as text, and if asked for, its errors, uncoloured."""
    texts = []
    for out in cell(notebook, cell_id).outputs:
        if stderr or out.get("name") != "stderr":
            texts.append(out.get("text") or out.get("data", {}).get("text/plain", ""))
            texts.extend(out.get("traceback", []) if stderr else [])
    return re.sub(r"\x1b\[[\d;]*m", "", "".join(texts))


def refusal(cells, cell_id):
    """Run a cell that must end in an error; return all that it shows."""
    with pytest.raises(CellExecutionError):
        cells(cell_id, cell_id)
    return output(cells.notebook, cell_id, stderr=True)


def section(title):
    """Return what stands in README under a heading, or in a folded part, that names the title."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    start = rf"(?:^## |<summary>)[^\n]*{re.escape(title)}[^\n]*\n"
    found = re.search(
        rf"{start}(.*?)(?=^## |^</?details>|\Z)", text, re.DOTALL | re.MULTILINE
    )
    assert found, f"README has no part {title!r}"
    return found[1]


def commands(title, language="bash"):
    """Return the blocks of code in that part of README, in their order."""
    return re.findall(
        rf"^ *```{language}\n(.*?)^ *```", section(title), re.DOTALL | re.MULTILINE
    )


def command(*parts, language="bash"):
    """Return the one line in README's blocks of code that has all these parts, wherever it stands."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    blocks = re.findall(
        rf"^ *```{language}\n(.*?)^ *```", text, re.DOTALL | re.MULTILINE
    )
    lines = [line.strip() for block in blocks for line in block.splitlines()]
    (found,) = [line for line in lines if all(part in line for part in parts)]
    return found


def quoted(words):
    """Return README's words for an error that holds these words: it must quote some."""
    troubles = section("When something goes wrong") + section("More troubles")
    pairs = re.findall(
        r"^- \*\*(?:uv: )?`(.+?)`(?:, `(.+?)`)?:\*\*", troubles, re.MULTILINE
    )
    (found,) = [quote for pair in pairs for quote in pair if words in quote]
    return found.split("…")


def shell(command, folder, env=os.environ):
    """Run a command in a folder, as a reader would who has uv; return its output."""
    need(os.name != "nt", "these commands are for Linux and macOS")
    env = env | {"PATH": f"{env['PATH']}{os.pathsep}{SCRIPTS}"}
    command, pipe = ["bash", "-ec", command], subprocess.PIPE
    done = subprocess.run(
        command, cwd=folder, env=env, check=False, stdout=pipe, text=True
    )
    print(done.stdout)
    done.check_returncode()
    return done.stdout


def pictured():
    """Return, as text, all that tests/images/ show and that a change may make untrue."""
    release = re.search(r"(?m)^mlflow==.+", (ROOT / "requirements.txt").read_text())[0]
    training = cell(notebook(), "define-training").source
    logged = re.findall(r"(?:set_tags?|log_input)\(.+\)", training)
    said_so = [release, EXPERIMENT, NAME, f"{RUNS}", f"{METRICS}", DATA, *logged]
    cells = ("compare-runs", "list-versions", "show-signature")
    return "\n".join(said_so + [output(notebook(), name) for name in cells])


DATA = said("load-data", r'data_name = "(.+)"')
NAME = said("load-data", r'MODEL_NAME = "(.+)"')
EXPERIMENT = said("connect", r'set_experiment\("(.+)"\)')
RUNS = {
    version: passed(cell(notebook(), cell_id).source)
    for version, cell_id in (("1", "run-lbfgs"), ("2", "run-newton-cg"))
}
METRICS = re.findall(r'"(\w+)":', said("define-training", r"(?s)metrics = \{(.+?)\}"))
