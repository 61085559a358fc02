"""The notebook on a team's server, set up by README's commands: accounts, PostgreSQL and S3."""

import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from contextlib import ExitStack
from glob import glob
from types import SimpleNamespace

import helpers
import psutil
import pytest
import requests

pytestmark = pytest.mark.slow
MOTO = "-m uv tool run --quiet --from moto[server]==5.2.5 moto_server --host 127.0.0.1 --port"


@pytest.fixture(scope="module")
def postgres():
    """What PostgreSQL's administrator has in the environment, and a way to crash and restart it."""
    pg_ctl = shutil.which("pg_ctl") or max(
        glob("/usr/lib/postgresql/*/bin/pg_ctl"), default=None
    )
    helpers.need(
        pg_ctl, "no PostgreSQL on this machine: Debian's package is postgresql"
    )
    user = (
        {}
        if os.getuid()
        else {"user": "postgres", "group": "postgres", "extra_groups": []}
    )
    with tempfile.TemporaryDirectory() as folder:
        shutil.chown(
            folder, user.get("user", os.getuid())
        )  # PostgreSQL refuses to run as root
        port = helpers.port_of(helpers.loopback())

        def control(action, *options):
            command = [
                pg_ctl,
                action,
                "-s",
                "-D",
                f"{folder}/data",
                "-l",
                f"{folder}/log",
            ]
            subprocess.run([*command, *options], cwd=folder, check=True, **user)

        control(
            "init", "-o", "-U postgres --auth-local trust --auth-host scram-sha-256"
        )
        control("start", "-o", f"-h 127.0.0.1 -p {port} -k {folder}")
        env = {"PGHOST": folder, "PGPORT": port, "PGUSER": "postgres"}
        yield env, lambda: control("restart", "-m", "immediate")
        control("stop", "-m", "immediate")


@pytest.fixture(scope="module")
def team(tmp_path_factory, postgres):
    """README's server: its address, an account, the store's address, and `crash()`."""
    database, install, serve, use = helpers.commands("A team's server")
    folder = tmp_path_factory.mktemp("team")
    address, store = helpers.loopback(), helpers.loopback()
    public = re.search(
        r"`(--allowed-hosts [^`]+)`", helpers.section("A team's server")
    )[1]
    account = dict(re.findall(r"export (\w+)=(.+)", use))
    assert account.pop("MLFLOW_TRACKING_URI") == "http://127.0.0.1:5000"
    administrator, restart_postgres = postgres
    with ExitStack() as stack:
        env = os.environ | administrator | {"MLFLOW_PORT": helpers.port_of(address)}
        helpers.shell(database + install, folder, env)
        moto = [sys.executable, *MOTO.split(), helpers.port_of(store)]
        stack.enter_context(helpers.running(moto, store, folder / "moto.log"))
        requests.put(f"{store}/mlflow", timeout=30).raise_for_status()  # the bucket

        def start():
            command = f"{serve.strip()} {public}".replace(
                "http://127.0.0.1:9000", store
            )
            where = {
                "url": f"{address}/health",
                "log": folder / "server.log",
                "cwd": folder,
            }
            return stack.enter_context(
                helpers.running(["bash", "-ec", command], env=env, **where)
            )

        def crash():
            os.killpg(server.pid, signal.SIGKILL)
            server.wait()
            restart_postgres()
            start()

        server = start()
        yield SimpleNamespace(
            address=address, account=account, store=store, crash=crash
        )


@pytest.mark.parametrize(
    "wrong", [{"PASSWORD": "wrong"}, {"USERNAME": None, "PASSWORD": None}]
)
def test_without_the_password_it_stops_before_it_logs_anything(team, tmp_path, wrong):
    account = team.account | {
        f"MLFLOW_TRACKING_{name}": value for name, value in wrong.items()
    }
    with helpers.kernel(tmp_path, team.address, **account) as run:
        run(last="lock-read")
        assert "401" in helpers.refusal(run, "connect")
    search = f"{team.address}/api/2.0/mlflow/experiments/search?max_results=9"
    found = requests.get(search, auth=tuple(team.account.values()), timeout=30).json()
    assert [experiment["name"] for experiment in found["experiments"]] == ["Default"]


def test_a_browser_that_came_by_the_public_address_may_list_the_runs(team):
    headers = {"Host": "mlflow.example.com", "Origin": "https://mlflow.example.com"}
    runs = f"{team.address}/ajax-api/2.0/mlflow/runs/search"
    asked = {"json": {"experiment_ids": ["0"]}, "auth": tuple(team.account.values())}
    assert requests.post(runs, headers=headers, timeout=30, **asked).ok


def test_what_was_logged_is_in_the_store_and_outlives_a_crash_of_the_servers(
    team, tmp_path
):
    with helpers.kernel(tmp_path, team.address, **team.account) as run:
        assert not [
            n for n in psutil.Process(run.pid).environ() if n.startswith("AWS_")
        ]
        run(last="compare-runs")
        team.crash()
        assert "champion" in helpers.output(run("reload-models"), "list-versions")
    stored = re.findall(
        "<Key>artifacts/(.*?)<", requests.get(f"{team.store}/mlflow").text
    )
    assert sum(name.endswith("/model.skops") for name in stored) == 2
    assert sum(name.endswith("/confusion_matrix.png") for name in stored) == 2
    assert not list(tmp_path.glob("ml*"))
