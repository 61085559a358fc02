"""The pytest plugin of this project: a server around all tests, and the notebook executed with edits."""

import os
import shutil
import signal
import socket
import subprocess
import time
from contextlib import contextmanager, suppress
from pathlib import Path

import nbformat
import requests
from nbclient import NotebookClient

ROOT = Path(__file__).resolve().parent.parent

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
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGTERM)
        process.wait(timeout=30)


def execute(folder, edits=(), **env):
    """Execute project.ipynb in `folder`, with the cells of some ids edited; return it.

    `edits` maps a cell's id to its new source, or to an (old, new) pair of texts, of which the old
    one must be there. `env` adds to the kernel's variables; None takes one out. Raises nbclient's
    CellExecutionError where a cell fails.
    """
    notebook = nbformat.read(ROOT / "project.ipynb", as_version=4)
    cells = {cell.id: cell for cell in notebook.cells}
    for cell_id, edit in dict(edits).items():
        if isinstance(edit, tuple):
            assert edit[0] in cells[cell_id].source, f"{cell_id} has no {edit[0]!r}"
            edit = cells[cell_id].source.replace(*edit)
        cells[cell_id].source = edit
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copy(ROOT / "requirements.txt", folder)
    variables = os.environ | {"PYTEST_CURRENT_TEST": None} | env
    variables = {name: value for name, value in variables.items() if value is not None}
    resources = {"metadata": {"path": str(folder)}}
    return NotebookClient(notebook, timeout=300, resources=resources).execute(
        env=variables
    )
