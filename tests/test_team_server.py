"""The notebook on a team's server, set up by README's commands: accounts, PostgreSQL and S3."""

import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from glob import glob
from types import SimpleNamespace

import helpers
import psutil
import pytest
import requests
from nbclient.exceptions import CellExecutionError

pytestmark = pytest.mark.slow
MOTO = "-m uv tool run --quiet --from moto[server]==5.2.5 moto_server --host 127.0.0.1 --port"


@pytest.fixture(scope="module")
def postgres():
    """What PostgreSQL's administrator has in the environment, and a way to crash and restart it."""
    pg_ctl = shutil.which("pg_ctl") or max(glob("/usr/lib/postgresql/*/bin/pg_ctl"), default=None)
    helpers.need(pg_ctl, "no PostgreSQL on this machine: Debian's package is postgresql")
    user = {} if os.getuid() else {"user": "postgres", "group": "postgres", "extra_groups": []}
    with tempfile.TemporaryDirectory() as folder:
        shutil.chown(folder, user.get("user", os.getuid()))  # PostgreSQL refuses to run as root
        env = {"PGHOST": folder, "PGPORT": str(helpers.free_port()), "PGUSER": "postgres"}

        def control(action, *options):
            command = [pg_ctl, action, "-s", "-D", f"{folder}/data", "-l", f"{folder}/log"]
            subprocess.run([*command, *options], cwd=folder, check=True, **user)

        control("init", "-o", "-U postgres --auth-local trust --auth-host scram-sha-256")
        control("start", "-o", f"-h 127.0.0.1 -p {env['PGPORT']} -k {folder}")
        yield env, lambda: control("restart", "-m", "immediate")
        control("stop", "-m", "immediate")


@pytest.fixture(scope="module")
def team(tmp_path_factory, postgres):
    """README's server: its address, an account, its folder, the store's objects, and `crash()`."""
    helpers.need(helpers.online(), "no network: neither pip nor uv can install anything")
    database, install, serve, use = helpers.commands("README.md", "A team's server")
    folder = tmp_path_factory.mktemp("team")
    port, store = str(helpers.free_port()), helpers.loopback()
    account = dict(re.findall(r"export (\w+)=(.+)", use.replace(":5000", f":{port}")))
    address = account.pop("MLFLOW_TRACKING_URI")
    with ExitStack() as stack:
        patch = stack.enter_context(pytest.MonkeyPatch.context())
        for name in [name for name in os.environ if name.startswith("AWS_")]:
            patch.delenv(name)  # whoever runs the tests may have keys of their own
        administrator, restart_postgres = postgres
        env = os.environ | administrator | {"MLFLOW_PORT": port}
        helpers.shell(database + install, folder, env)
        moto = [sys.executable, *MOTO.split(), store.split(":")[-1]]
        stack.enter_context(helpers.running(moto, store, folder / "moto.log"))
        requests.put(f"{store}/mlflow", timeout=30).raise_for_status()  # the bucket

        def objects():
            return set(re.findall("<Key>(.*?)<", requests.get(f"{store}/mlflow", timeout=30).text))

        def start():
            command = ["bash", "-ec", serve.replace("http://127.0.0.1:9000", store)]
            where = {"url": f"{address}/health", "log": folder / "server.log", "cwd": folder}
            return stack.enter_context(helpers.running(command, env=env, **where))

        def crash():
            os.killpg(server.pid, signal.SIGKILL)
            server.wait()
            restart_postgres()
            start()

        server = start()
        yield SimpleNamespace(
            address=address, account=account, folder=folder, objects=objects, crash=crash
        )


@pytest.mark.parametrize("wrong", [{"PASSWORD": "wrong"}, {"USERNAME": None, "PASSWORD": None}])
def test_without_the_password_it_stops_within_ten_seconds_and_logs_nothing(team, tmp_path, wrong):
    account = team.account | {f"MLFLOW_TRACKING_{name}": value for name, value in wrong.items()}
    with helpers.kernel(tmp_path, team.address, **account) as run:
        run(last="lock-read")
        started = time.monotonic()
        with pytest.raises(CellExecutionError, match="401"):
            run("connect", "connect")
        assert time.monotonic() - started < 10
    search = f"{team.address}/api/2.0/mlflow/experiments/search?max_results=9"
    found = requests.get(search, auth=tuple(team.account.values()), timeout=30).json()
    assert [experiment["name"] for experiment in found["experiments"]] == ["Default"]


def test_models_and_figures_are_in_the_store_whose_keys_the_client_lacks(team, tmp_path):
    before = team.objects()
    with helpers.kernel(tmp_path, team.address, **team.account) as run:
        assert not [n for n in psutil.Process(run.pid).environ() if n.startswith("AWS_")]
        run()
    stored = [name for name in team.objects() - before if name.startswith("artifacts/")]
    assert sum(name.endswith("/model.skops") for name in stored) == 2
    assert sum(name.endswith("/confusion_matrix.png") for name in stored) == 2
    assert not [*team.folder.glob("ml*"), *tmp_path.glob("ml*")]  # neither files nor SQLite


def test_what_was_logged_outlives_a_crash_of_the_server_and_its_database(team, tmp_path):
    with helpers.kernel(tmp_path, team.address, **team.account) as run:
        run(last="compare-runs")
        team.crash()
        assert "champion" in helpers.output(run("reload-models"), "list-versions")


def test_two_notebooks_at_once_get_versions_of_their_own(team, tmp_path):
    with ThreadPoolExecutor() as pool:
        folders = [tmp_path / "left", tmp_path / "right"]
        runs = [pool.submit(helpers.execute, f, team.address, **team.account) for f in folders]
    shown = "\n".join(helpers.output(run.result(), "list-versions") for run in runs)
    assert len(set(re.findall(r"^\d +(\d+)", shown, re.MULTILINE))) == 4
