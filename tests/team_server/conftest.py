"""Machines on which the tests follow .github/TEAM-SERVER.md, as an operator would."""

import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from contextlib import ExitStack, contextmanager
from glob import glob
from pathlib import Path

import mlflow
import pytest
from suite import free_port, running

GUIDE = Path(__file__).parents[2] / ".github/TEAM-SERVER.md"
BLOCKS = re.findall(
    r"^```(\w+)\n(.*?)\n```", GUIDE.read_text("utf-8"), re.DOTALL | re.MULTILINE
)
UNUSED = {code for language, code in BLOCKS if language != "nginx"}


@contextmanager
def postgres(pg_ctl):
    """Run an empty PostgreSQL; give the variables of its administrator."""
    # PostgreSQL refuses to run as root
    user = {"user": "postgres", "group": "postgres", "extra_groups": []}
    user = {} if os.getuid() else user
    with tempfile.TemporaryDirectory() as folder:
        shutil.chown(folder, user.get("user", os.getuid()))
        port = str(free_port())

        def control(action, *options):
            command = [pg_ctl, action, "-s", "-D", f"{folder}/data"]
            command += ["-l", f"{folder}/log", *options]
            subprocess.run(command, cwd=folder, check=True, **user)

        access = "--auth-local trust --auth-host scram-sha-256"
        control("init", "-o", f"-U postgres --no-sync {access}")
        control("start", "-o", f"-h 127.0.0.1 -p {port} -k {folder}")
        try:
            yield {"PGHOST": folder, "PGPORT": port, "PGUSER": "postgres"}
        finally:
            control("stop", "-m", "immediate")


def renamed(text, names):
    """Return the text with each of the names replaced by the one that it stands for."""
    return re.sub("|".join(map(re.escape, names)), lambda found: names[found[0]], text)


class Machine:
    """A machine with PostgreSQL, Python and an empty folder, and its names for the guide's."""

    admin = ("admin", "change-me-as-well")

    def __init__(self, folder, administrator):
        self.folder, self.administrator = folder / "srv", administrator
        self.folder.mkdir()
        port = str(free_port())
        self.url = f"http://127.0.0.1:{port}"
        self.names = {
            "/srv/mlflow": str(self.folder),
            "127.0.0.1/mlflow": f"127.0.0.1:{administrator['PGPORT']}/mlflow",
            "5000": port,
        }
        self.server = ExitStack()

    def block(self, words, **names):
        """Return the guide's only block with these words, with this machine's names in it."""
        found = [code for _, code in BLOCKS if words in code]
        assert len(found) == 1, f"{len(found)} blocks of the guide have {words!r}"
        UNUSED.discard(found[0])
        return renamed(found[0], self.names | names)

    def run(self, words, typed="", cwd=None, env=(), **names):
        """Run a block of the guide's, as one who types this when asked."""
        done = subprocess.run(
            ["bash", "-ec", self.block(words, **names)],
            cwd=cwd or self.folder,
            env=os.environ | dict(env),
            check=True,
            input=typed,  # there is no terminal in a new session
            start_new_session=True,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert "error_code" not in done.stdout, done.stdout

    def sql(self, query):
        """Return the database's answer."""
        command = ["psql", "--quiet", "-At", "-d", "mlflow", "-c", query]
        env = os.environ | self.administrator
        return subprocess.check_output(command, env=env, text=True).strip()

    def make_database(self):
        """Follow the guide's first block."""
        password = "change-me\n"
        self.run("createuser", typed=2 * password, env=self.administrator)

    def warm(self, *packages):
        """Install with uv, in seconds; pip takes a minute, and then finds everything there."""
        uv = [sys.executable, "-m", "uv", "--quiet"]
        environment = self.folder / ".venv"
        make = [*uv, "venv", "--seed", "--python", sys.executable, environment]
        subprocess.run(make, check=True)
        install = [*uv, "pip", "install", "--python", environment, *packages]
        subprocess.run(install, check=True)

    def start(self, cwd):
        """Start the server by the guide's block, from this folder; wait until it answers."""
        command = ["bash", "-ec", self.block("--app-name")]
        env = {k: v for k, v in os.environ.items() if not k.startswith("MLFLOW_")}
        log, health = cwd / "server.log", f"{self.url}/health"
        started = running(command, health, log, cwd=cwd, env=env)
        self.process = self.server.enter_context(started)

    def stop(self):
        """Stop the server, if it runs."""
        self.server.close()

    def add(self, person):
        """Make an account by the guide's call."""
        self.run("users/create", typed=f"{self.admin[1]}\n", ann=person)


@pytest.fixture(scope="module")
def machine(tmp_path_factory):
    """A function that makes a machine; all that runs there ends with the tests."""
    pg_ctl = shutil.which("pg_ctl")
    pg_ctl = pg_ctl or max(glob("/usr/lib/postgresql/*/bin/pg_ctl"), default=None)
    if not pg_ctl:
        pytest.skip("no PostgreSQL here: Debian's package is postgresql")
    if not shutil.which("curl"):
        pytest.skip("no curl here")
    with ExitStack() as stack:

        def make(name):
            administrator = stack.enter_context(postgres(pg_ctl))
            made = Machine(tmp_path_factory.mktemp(name), administrator)
            stack.callback(made.stop)
            return made

        yield make


@pytest.fixture(scope="module")
def team(machine, tmp_path_factory):
    """The machine of the guide's operator, who has followed steps 1 to 3."""
    team = machine("team")
    team.make_database()
    packages = re.search("pip install (.*)", team.block("mkdir -p /srv"))[1]
    team.warm(*shlex.split(packages))
    team.run("mkdir -p /srv")
    team.run("/dev/null /srv")
    (team.folder / "server.env").write_text(team.block("PGPASSWORD=") + "\n")
    (team.folder / "auth.ini").write_text(team.block("database_uri") + "\n")
    team.start(tmp_path_factory.mktemp("start"))
    return team


@pytest.fixture
def sign_in(monkeypatch):
    """A function that makes MLflow's client here work as somebody on a machine's server."""

    def sign_in(machine, name):
        monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", name)
        monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", f"change-me-{name}")
        monkeypatch.setenv("MLFLOW_TRACKING_URI", machine.url)
        mlflow.set_tracking_uri(machine.url)
        return mlflow.MlflowClient()

    yield sign_in
    mlflow.set_tracking_uri(None)


@pytest.fixture
def unused_blocks(team):
    """The guide's blocks of code, but nginx's, that no test before has used."""
    return UNUSED
