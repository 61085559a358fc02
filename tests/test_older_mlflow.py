"""MLflow 2.16.2: refused as a server, and good enough after the edits that README names."""

import os
import re
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
import requests
from conftest import ROOT, free_port, output, running
from test_executions import SAVED
from test_server_cell import refusal

README = (ROOT / "README.md").read_text(encoding="utf-8")
SECTION = README.split("## MLflow 2.16.2\n")[1].split("\n## ")[0]
INSTALL, SERVE = re.findall(r"```bash\n(.*?)```", SECTION, re.DOTALL)
EDITS = re.findall(r"^\| (\d\. .+) \| `(.+)` \| `(.+)` \|$", SECTION, re.MULTILINE)
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with the environment and the requirements.txt that README's commands make."""
    folder = tmp_path_factory.mktemp("older")
    scripts = str(Path(sys.executable).parent)  # uv is there
    env = os.environ | {"PATH": f"{scripts}{os.pathsep}{os.environ['PATH']}"}
    subprocess.run(["bash", "-ec", INSTALL], cwd=folder, env=env, check=True)
    return folder


@pytest.fixture
def address(folder, tmp_path):
    """The server of MLflow 2.16.2, started by README's command, with an empty store."""
    (tmp_path / ".venv").symlink_to(folder / ".venv")
    address = f"http://127.0.0.1:{(port := free_port())}"
    command = ["bash", "-ec", f"{SERVE.strip()} --port {port}"]
    with running(command, f"{address}/health", tmp_path / "server.log", cwd=tmp_path):
        yield address


def test_its_server_is_refused_before_anything_is_logged(tmp_path, address):
    message, _ = refusal(tmp_path / "notebook", MLFLOW_TRACKING_URI=address)
    assert "MLflow 2.16.2" in message and "MLflow 3.17.2" in message
    search = f"{address}/api/2.0/mlflow/experiments/search?max_results=10"
    experiments = requests.get(search, timeout=5).json()["experiments"]
    assert [experiment["name"] for experiment in experiments] == ["Default"]


def test_after_readmes_edits_the_notebook_runs_on_it(folder, address):
    notebook = nbformat.read(ROOT / "project.ipynb", as_version=4)
    assert len(EDITS) == 3
    for title, old, new in EDITS:
        section = None
        found = []
        for cell in notebook.cells:
            section = next(iter(re.findall(r"^## (.+)$", cell.source, re.MULTILINE)), section)
            if section == title and cell.cell_type == "code" and old in cell.source:
                found.append(cell)
        (cell,) = found
        cell.source = cell.source.replace(old, new)
    nbformat.write(notebook, folder / "project.ipynb")
    command = ".venv/bin/jupyter nbconvert --execute --to notebook --output done project.ipynb"
    env = os.environ | {"MLFLOW_TRACKING_URI": address}
    subprocess.run(command.split(), cwd=folder, env=env, check=True)

    done = nbformat.read(folder / "done.ipynb", as_version=4)
    for cell in ["compare-runs", "list-versions", "reload-models", "predict", "find-mistakes"]:
        assert output(done, cell) == output(SAVED, cell)
