"""The notebook on a team's server, set up as README says: PostgreSQL, accounts, several workers."""

import os
import re
import shutil
import signal
import subprocess
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from itertools import takewhile

import pytest
import requests
from conftest import ROOT, execute, free_port, kernel, running
from test_executions import check, versions_shown
from test_server_cell import refusal

README = (ROOT / "README.md").read_text(encoding="utf-8")
SECTION = README.split("## Outgrowing one machine\n")[1].split("\n## ")[0]
DATABASE, INSTALL, SERVE, USE = re.findall(r"```bash\n(.*?)```", SECTION, re.DOTALL)
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def postgres():
    """The environment variables that lead to a PostgreSQL server, which ends with the tests."""
    if not shutil.which("pg_virtualenv"):
        pytest.skip("no PostgreSQL on this machine: Debian's package is postgresql")
    command = ["pg_virtualenv", "bash", "-c", "env; echo; cat"]  # cat: until its input is closed
    user = {"user": "postgres", "group": "postgres", "extra_groups": []}
    with subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd="/",
        **(user if os.getuid() == 0 else {}),  # PostgreSQL refuses to run as root
    ) as server:
        lines = takewhile(str.strip, server.stdout)
        variables = dict(line.strip().split("=", 1) for line in lines if line.startswith("PG"))
        assert variables, "pg_virtualenv started no PostgreSQL server"
        yield variables
        server.communicate()


@pytest.fixture(scope="module")
def shared(tmp_path_factory, postgres):
    """The variables that README tells a client to set, and a function that kills and restarts."""
    folder = tmp_path_factory.mktemp("shared")
    shutil.copy(ROOT / "requirements.txt", folder)
    port = str(free_port())
    env = os.environ | postgres | {"MLFLOW_PORT": port}
    for command in [DATABASE, INSTALL]:
        subprocess.run(["bash", "-ec", command], cwd=folder, env=env, check=True)
    variables = dict(re.findall(r"export (\w+)=(.+)", USE.replace(":5000", f":{port}")))

    with ExitStack() as stack:

        def start():
            command, health = ["bash", "-ec", SERVE], f"{variables['MLFLOW_TRACKING_URI']}/health"
            server = running(command, health, folder / "server.log", cwd=folder, env=env)
            return stack.enter_context(server)

        def kill_and_restart():
            os.killpg(server.pid, signal.SIGKILL)
            server.wait()
            start()

        server = start()
        assert not (folder / "mlflow.db").exists(), "the server uses SQLite"
        yield variables, kill_and_restart


@pytest.mark.parametrize("wrong", [{"PASSWORD": "wrong"}, {"USERNAME": None, "PASSWORD": None}])
def test_without_the_right_password_nothing_is_logged_and_the_error_comes_within_five_seconds(
    shared, tmp_path, wrong
):
    variables, _ = shared
    changed = {f"MLFLOW_TRACKING_{key}": value for key, value in wrong.items()}
    message, seconds = refusal(tmp_path, **variables | changed)
    assert "set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD" in message
    assert seconds < 5
    experiments = requests.get(
        f"{variables['MLFLOW_TRACKING_URI']}/api/2.0/mlflow/experiments/search?max_results=9",
        auth=(variables["MLFLOW_TRACKING_USERNAME"], variables["MLFLOW_TRACKING_PASSWORD"]),
        timeout=10,
    )
    assert [found["name"] for found in experiments.json()["experiments"]] == ["Default"]


def test_a_server_that_is_killed_between_logging_and_reloading_has_lost_nothing(shared, tmp_path):
    variables, kill_and_restart = shared
    with kernel(tmp_path, **variables) as run:
        run("settings", "list-versions")
        kill_and_restart()
        check(run("reload-intro"))
    assert not (tmp_path / "mlflow.db").exists()


def test_two_notebooks_at_once_get_versions_of_their_own(shared, tmp_path):
    variables, _ = shared
    folders = [tmp_path / "left", tmp_path / "right"]
    with ThreadPoolExecutor() as pool:
        notebooks = list(pool.map(lambda folder: execute(folder, **variables), folders))
    left, right = (versions_shown(notebook) for notebook in notebooks)
    assert len({*left, *right}) == 4
