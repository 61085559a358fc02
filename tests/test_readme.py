"""README's commands and the notebook's last words, as they stand there, in a fresh copy."""

import os
import re
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import mlflow
import nbformat
import pytest
from conftest import ROOT, answers, free_port, mlflow_server, running

README = (ROOT / "README.md").read_text(encoding="utf-8")
RUN, _, LOOK = re.findall(r"```bash\n(.*?)```", README, re.DOTALL)[:3]
STEPS = re.search(r"\*\*Step by step.*?```bash\n(.*?)```", README, re.DOTALL)[1]
LIST_DELETED, RESTORE = re.findall(r"`\.venv/bin/mlflow (experiments .+)`", README)
PORT = re.search(r"`(--port) 5001`", README)[1]
RUN_WITH_UV = re.search(r"^uv venv .* nbconvert .*$", README, re.MULTILINE)[0]
TRACKED = [
    "project.ipynb",
    "requirements.txt",
    "README.md",
    "LICENSE",
    ".gitignore",
]
CLOSING = nbformat.read(ROOT / "project.ipynb", as_version=4).cells[-1].source
CLEAN_UP = re.search(r"^\*\*Clean up\.\*\* .*$", CLOSING, re.MULTILINE)[0]


@pytest.fixture
def env():
    """The environment variables of a reader, who has uv and no server that a variable names."""
    variables = {key: value for key, value in os.environ.items() if key != "MLFLOW_TRACKING_URI"}
    return variables | {"PATH": f"{variables['PATH']}{os.pathsep}{Path(sys.executable).parent}"}


@pytest.fixture(params=[RUN, RUN_WITH_UV], ids=["with pip", "with uv"])
def command(request):
    return request.param


@pytest.mark.slow
def test_the_run_command_does_everything_and_a_second_time_adds_versions(tmp_path, env, command):
    if answers("http://127.0.0.1:5000/health"):
        pytest.skip("somebody else's MLflow server has the port 5000, which the command would use")
    for name in TRACKED:
        shutil.copy(ROOT / name, tmp_path)
    subprocess.run(["bash", "-ec", command], cwd=tmp_path, env=env, check=True)
    page = tmp_path / "output" / "project.html"
    assert "Version 1: 30 of 30 predictions as before" in page.read_text(encoding="utf-8")
    again = command[command.index(".venv/bin/jupyter") :]  # the environment is there already
    subprocess.run(["bash", "-ec", again], cwd=tmp_path, env=env, check=True)
    assert "Version 3: 30 of 30 predictions as before" in page.read_text(encoding="utf-8")
    for name in TRACKED:
        assert (tmp_path / name).read_bytes() == (ROOT / name).read_bytes(), f"{name} was changed"
    left = {path.name for path in tmp_path.iterdir()} - set(TRACKED)
    assert left == set(re.findall(r"`([\w.-]+)/?`", CLEAN_UP)), "what the clean-up names"

    assert not answers("http://127.0.0.1:5000/health"), "the notebook's server is still there"
    port = free_port()
    look = f"{LOOK.strip()} {PORT} {port}"
    page, log = f"http://127.0.0.1:{port}", tmp_path / "ui.log"
    with running(["bash", "-c", look], page, log, cwd=tmp_path, env=env):
        pass
    if command == RUN:
        steps = f"{textwrap.dedent(STEPS)}\n.venv/bin/jupyter-lab --version"
        subprocess.run(["bash", "-ec", steps], cwd=tmp_path, env=env, check=True)


def test_a_deleted_experiment_comes_back_by_the_command_for_it(tmp_path, env):
    with mlflow_server(tmp_path) as address:
        client = mlflow.MlflowClient(address)
        experiment = client.create_experiment("deleted by accident")
        client.delete_experiment(experiment)

        def run(command):
            command = [sys.executable, "-m", "mlflow", *command.split()]
            return subprocess.check_output(command, cwd=tmp_path, env=env, text=True)

        assert re.search(rf"^{experiment} +deleted by accident", run(LIST_DELETED), re.MULTILINE)
        run(RESTORE)
        assert client.get_experiment(experiment).lifecycle_stage == "active"


def test_the_command_for_it_empties_the_cache_of_uv(tmp_path, env):
    command = re.search(r"`(uv .+)` empties it", CLEAN_UP)[1]
    (tmp_path / "download").touch()
    subprocess.run(command.split(), env=env | {"UV_CACHE_DIR": str(tmp_path)}, check=True)
    assert not (tmp_path / "download").exists()
