"""MLflow 2.16.2: refused as a server, and good enough after the two edits that README names."""

import re

import nbformat
import pytest
import requests
from helpers import (
    commands,
    loopback,
    need,
    need_network,
    notebook,
    output,
    running,
    section,
    shell,
)
from test_server import answers, kernel, refused, start

TITLE = "MLflow 2.16.2"
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with the environment and the requirements.txt that README's commands make."""
    need_network()
    folder = tmp_path_factory.mktemp("older")
    shell(commands("README.md", TITLE)[0], folder)
    return folder


@pytest.fixture
def serve(folder, tmp_path):
    """A function that starts the server of MLflow 2.16.2 with README's command, its store empty."""
    (tmp_path / ".venv").symlink_to(folder / ".venv")

    def serve(address):
        command = f"{commands('README.md', TITLE)[1].strip()} --port {address.rsplit(':', 1)[1]}"
        log = tmp_path / "server.log"
        return running(["bash", "-ec", command], f"{address}/health", log, cwd=tmp_path)

    return serve


def test_its_server_is_refused_before_anything_is_logged(serve, tmp_path):
    with serve(address := loopback()):
        shown, _ = refused(tmp_path / "notebook", address)
        assert "# 404: this server is older than MLflow 3" in shown
        assert "logged-models/search failed with error code 404" in shown
        search = f"{address}/api/2.0/mlflow/experiments/search?max_results=10"
        experiments = requests.get(search, timeout=5).json()["experiments"]
        assert [experiment["name"] for experiment in experiments] == ["Default"]


def test_its_server_at_port_5000_is_passed_by_without_a_word(serve, tmp_path):
    need(
        not any(answers(f"http://127.0.0.1:{port}") for port in (5000, 5001)), "port 5000 is taken"
    )
    with serve("http://127.0.0.1:5000"), kernel(tmp_path / "notebook", None) as run:
        assert start(run) == "Logging to http://127.0.0.1:5001\n"
        assert output(run.notebook, "find-server") == ""


def test_after_readmes_edits_the_notebook_runs_on_it(serve, folder, tmp_path):
    older = notebook()
    edits = re.findall(r"^\| `(.+)` \| `(.+)` \|$", section("README.md", TITLE), re.MULTILINE)
    assert len(edits) == 2
    for old, new in edits:
        (cell,) = [c for c in older.cells if c.cell_type == "code" and old in c.source]
        cell.source = cell.source.replace(old, new)
    nbformat.write(older, folder / "project.ipynb")
    with serve(address := loopback()):
        command = ".venv/bin/jupyter nbconvert --execute --to notebook --output done project.ipynb"
        shell(f"MLFLOW_TRACKING_URI={address} {command}", folder)
    done = nbformat.read(folder / "done.ipynb", as_version=4)
    for cell in ["compare-runs", "reload-models", "find-mistakes", "validate", "list-versions"]:
        assert output(done, cell) == output(notebook(), cell)
