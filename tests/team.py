"""A team's server, set up by the blocks of code in .github/TEAM-SERVER.md."""

import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from contextlib import contextmanager
from glob import glob

import helpers

GUIDE = (helpers.ROOT / ".github/TEAM-SERVER.md").read_text(encoding="utf-8")
ADMIN = ("admin", "change-me-as-well")
PUBLIC = "127.0.0.2"  # this machine again, but not a name that MLflow trusts anyway


def block(words):
    """Return the guide's only block of code with these words in it."""
    found = re.findall(r"^```\w+\n(.*?)^```", GUIDE, re.DOTALL | re.MULTILINE)
    return only(found, words)


def quote(words):
    """Return what the guide quotes, in a line or a block of its own, with these words in it."""
    found = re.findall(r"^```text\n(.*?)^```", GUIDE, re.DOTALL | re.MULTILINE)
    prose = re.sub(r"^```.*?^```", "", GUIDE, flags=re.DOTALL | re.MULTILINE)
    return only(found + re.findall(r"`([^`\n]+)`", prose), words)


def only(texts, words):
    """Return the only text with these words in it."""
    found = [text.strip() for text in texts if words in text]
    assert len(found) == 1, f"{len(found)} pieces of the guide have {words!r}"
    return found[0]


def login(name):
    """Return the variables of an account that the guide's call has made."""
    return {
        "MLFLOW_TRACKING_USERNAME": name,
        "MLFLOW_TRACKING_PASSWORD": f"change-me-{name}",
    }


@contextmanager
def postgres():
    """Run an empty PostgreSQL; give its administrator's variables, and a way to crash it."""
    pg_ctl = shutil.which("pg_ctl") or max(
        glob("/usr/lib/postgresql/*/bin/pg_ctl"), default=None
    )
    helpers.need(pg_ctl, "no PostgreSQL here: Debian's package is postgresql")
    # PostgreSQL refuses to run as root
    user = {"user": "postgres", "group": "postgres", "extra_groups": []}
    user = {} if os.getuid() else user
    with tempfile.TemporaryDirectory() as folder:
        shutil.chown(folder, user.get("user", os.getuid()))
        port = helpers.port_of(helpers.loopback())

        def control(action, *options):
            command = [pg_ctl, action, "-s", "-D", f"{folder}/data"]
            command += ["-l", f"{folder}/log", *options]
            subprocess.run(command, cwd=folder, check=True, **user)

        access = "--auth-local trust --auth-host scram-sha-256"
        control("init", "-o", f"-U postgres {access}")
        control("start", "-o", f"-h 127.0.0.1 -p {port} -k {folder}")
        env = {"PGHOST": folder, "PGPORT": port, "PGUSER": "postgres"}
        try:
            yield env, lambda: control("restart", "-m", "immediate")
        finally:
            control("stop", "-m", "immediate")


class Server:
    """One server by the guide: its folder, addresses and database in place of the guide's."""

    def __init__(self, folder, administrator, database="mlflow"):
        self.folder, self.administrator = folder / "srv", administrator
        self.database = database
        self.address, self.store = helpers.loopback(), helpers.loopback()
        self.public = f"https://{PUBLIC}:{helpers.port_of(helpers.loopback())}"
        self.uri = f"postgresql://mlflow@127.0.0.1:{administrator['PGPORT']}/{database}"
        self.certificate = self.folder / "mlflow.crt"
        self.folder.mkdir(parents=True)

    def text(self, words, **names):
        """Return a piece of the guide's code, with this server's names in it."""
        port = helpers.port_of(self.public)
        names = names | {
            "postgresql://mlflow@127.0.0.1/mlflow": self.uri,
            "createdb --owner mlflow mlflow": f"createdb --owner mlflow {self.database}",
            "/srv/mlflow": str(self.folder),
            "/etc/ssl/mlflow": str(self.folder / "mlflow"),
            "http://127.0.0.1:5000": self.address,
            "MLFLOW_PORT=5000": f"MLFLOW_PORT={helpers.port_of(self.address)}",
            "http://127.0.0.1:9000": self.store,
            "listen 443": f"listen {PUBLIC}:{port}",
            "server_name mlflow.example.com": f"server_name {PUBLIC}",
            "mlflow.example.com": f"{PUBLIC}:{port}",
        }
        text = block(words)
        for old, new in names.items():
            text = text.replace(old, new)
        return text

    def run(self, words, typed="", cwd=None, **names):
        """Run a block of the guide's, as one who types this when asked; return its output."""
        output = ""
        for command in re.split(r"\n(?=curl)", self.text(words, **names)):
            trust = {"CURL_CA_BUNDLE": str(self.certificate)}
            done = subprocess.run(
                ["bash", "-ec", command],
                cwd=cwd or self.folder,
                env=os.environ | (trust if command.startswith("curl") else {}),
                check=False,
                input=typed,  # there is no terminal in a new session
                start_new_session=True,
                stdout=subprocess.PIPE,
                text=True,
            )
            print(command, done.stdout, sep="\n")
            done.check_returncode()
            output += done.stdout
        assert "error_code" not in output, output
        return output

    def make_database(self):
        """Make the role, unless it is there, and the database."""
        role, database = self.text("createuser").splitlines()
        commands = [role, database] if self.database == "mlflow" else [database]
        for command in commands:
            subprocess.run(
                command.split(),
                env=os.environ | self.administrator,
                check=True,
                input="change-me\nchange-me\n",
                start_new_session=True,
                text=True,
            )

    def sql(self, command):
        """Run a command in the database; return what it answers."""
        psql = ["psql", "--quiet", "-At", "-d", self.database, "-c", command]
        env = os.environ | self.administrator
        return subprocess.check_output(psql, env=env, text=True).strip()

    def warm(self, *packages):
        """Make its environment with uv, which takes seconds."""
        uv = [sys.executable, "-m", "uv", "--quiet"]
        environment = self.folder / ".venv"
        make = [*uv, "venv", "--seed", "--python", sys.executable, environment]
        subprocess.run(make, check=True)
        install = [*uv, "pip", "install", "--python", environment, *packages]
        subprocess.run(install, check=True)

    def write_settings(self):
        """Write server.env and auth.ini."""
        self.run("install -m")
        settings = [self.text("PGPASSWORD="), self.text("ALLOWED_HOSTS=")]
        (self.folder / "server.env").write_text("\n".join(settings) + "\n")
        (self.folder / "auth.ini").write_text(self.text("database_uri"))

    @contextmanager
    def running(self, cwd, log="server.log"):
        """Run it from a folder during the block, which begins when it answers."""
        command = ["bash", "-ec", f"exec {self.text('--env-file')}"]
        health = f"{self.address}/health"
        with helpers.running(command, health, cwd / log, cwd=cwd) as process:
            yield process

    @contextmanager
    def nginx(self, without=""):
        """Run nginx in front of it, by the guide's block, without one line if asked."""
        program = shutil.which("nginx", path=f"{os.environ['PATH']}:/usr/sbin")
        helpers.need(program, "no nginx here: Debian's package is nginx")
        helpers.need(shutil.which("openssl"), "no openssl here")
        if not self.certificate.exists():
            command = (
                "openssl req -x509 -newkey rsa:2048 -nodes -days 1 -subj /CN=mlflow"
            )
            command += f" -addext subjectAltName=IP:{PUBLIC} -out mlflow.crt"
            command += " -keyout mlflow.key"
            subprocess.run(
                command.split(), cwd=self.folder, check=True, capture_output=True
            )
        site = self.text("proxy_pass").replace(without, "")
        with tempfile.TemporaryDirectory() as folder:
            up = helpers.loopback()
            kinds = ["client_body", "proxy", "fastcgi", "uwsgi", "scgi"]
            temporary = "".join(f"{kind}_temp_path {folder}/{kind};" for kind in kinds)
            ready = f"server {{ listen {up.removeprefix('http://')}; return 204; }}"
            configuration = self.folder / "nginx.conf"
            configuration.write_text(
                f"daemon off; pid {folder}/pid; error_log {folder}/log;"
                f"{'' if os.getuid() else 'user root;'} events {{}}\n"
                f"http {{ access_log off; {temporary} {ready}\n{site}\n}}\n"
            )
            command = [program, "-e", f"{folder}/log", "-c", str(configuration)]
            with helpers.running(command, up, self.folder / "nginx.log"):
                yield


def kill(process):
    """End a server, with its workers, as a power cut does."""
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
