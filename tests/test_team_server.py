"""The guide for a team's server, by its own commands: PostgreSQL, accounts, TLS, backup, upgrade, S3."""

import configparser
import json
import os
import re
import shutil
import subprocess
import sys
import threading
import time
from contextlib import ExitStack
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import helpers
import mlflow
import psutil
import pytest
import requests
import team as guide
from mlflow.exceptions import MlflowException
from nbclient.exceptions import CellExecutionError
from playwright.sync_api import expect
from sklearn.datasets import load_iris
from sklearn.linear_model import LogisticRegression

pytestmark = pytest.mark.slow
MOTO = "-m uv tool run --quiet --from moto[server]==5.2.5 moto_server --host 127.0.0.1 --port"
X, Y = load_iris(as_frame=True, return_X_y=True)
CHAMPION = f"models:/{helpers.NAME}@champion"


@pytest.fixture(scope="module")
def database():
    """PostgreSQL: its administrator's variables, and a way to crash and restart it."""
    with guide.postgres() as running:
        yield running


@pytest.fixture(scope="module")
def team(tmp_path_factory, database):
    """The guide's server, behind nginx; `restart` ends it at once and starts it elsewhere."""
    helpers.need(shutil.which("curl"), "no curl here")
    folder = tmp_path_factory.mktemp("team")
    administrator, crash = database
    server = guide.Server(folder, administrator)
    server.make_database()
    server.run("chmod 700")
    server.write_settings()
    with ExitStack() as stack:
        patch = stack.enter_context(pytest.MonkeyPatch.context())
        for name in ("no_proxy", "NO_PROXY"):  # no proxy knows the public address
            patch.setenv(name, f"{os.environ[name]},{guide.PUBLIC}")
        stack.enter_context(server.nginx())

        def restart(cwd):
            guide.kill(server.process)
            crash()
            server.process = stack.enter_context(server.running(cwd))

        server.process = stack.enter_context(server.running(folder))
        server.restart = restart
        yield server


@pytest.fixture
def sign_in(monkeypatch):
    """A function that gives a client of a server which works as one of its users."""

    def sign_in(server, name):
        for variable, value in guide.login(name).items():
            monkeypatch.setenv(variable, value)
        monkeypatch.setenv("MLFLOW_TRACKING_URI", server.address)
        mlflow.set_tracking_uri(server.address)
        return mlflow.MlflowClient()

    yield sign_in
    mlflow.set_tracking_uri(None)


def add_person(server, name):
    """Make an account with the guide's call."""
    server.run("users/create", typed=f"{guide.ADMIN[1]}\n", ben=name)


def answers(model_uri=CHAMPION):
    """Return what a model on the server says about 150 flowers."""
    return mlflow.pyfunc.load_model(model_uri).predict(X).tolist()


def experiment_id(name):
    """Return the number of an experiment, which is made if nobody has made it yet."""
    # set_experiment would also leave its number in the variables of later tests' kernels
    found = mlflow.get_experiment_by_name(name)
    return found.experiment_id if found else mlflow.create_experiment(name)


def log_model(experiment, name):
    """Log and register a small model; return its version."""
    with mlflow.start_run(experiment_id=experiment_id(experiment)):
        mlflow.log_text("trained on everything", "note.txt")
        model = LogisticRegression(max_iter=1000).fit(X, Y)
        info = mlflow.sklearn.log_model(
            model, name="model", pip_requirements=[], registered_model_name=name
        )
    return mlflow.MlflowClient().get_model_version(name, info.registered_model_version)


def as_person(server, home):
    """Return the variables of a person who has the credentials file in this home."""
    cache = Path.home() / ".cache"
    return {
        "HOME": str(home),
        "XDG_CACHE_HOME": os.environ.get("XDG_CACHE_HOME", str(cache)),
        "MLFLOW_TRACKING_SERVER_CERT_PATH": str(server.certificate),
    }


def write_credentials(server, home, name):
    """Write the guide's credentials file."""
    file = home / ".mlflow/credentials"
    file.parent.mkdir(parents=True)
    file.write_text(server.text("mlflow_tracking_username", ben=name))


def plain(error):
    """Return an error's words without colours."""
    return re.sub(r"\x1b\[[\d;]*m", "", str(error.value))


@pytest.fixture(scope="module")
def first(team, tmp_path_factory):
    """Ann, the first person: she runs the notebook through the public address."""
    home = tmp_path_factory.mktemp("ann")
    add_person(team, "ann")
    write_credentials(team, home, "ann")
    address = team.text("export MLFLOW_TRACKING_URI=https").split("=")[1]
    helpers.execute(home / "work", address, **as_person(team, home))
    return home / "work"


@pytest.mark.parametrize(
    "wrong", [{"PASSWORD": "wrong"}, {"USERNAME": None, "PASSWORD": None}]
)
def test_without_the_password_it_stops_before_it_logs_anything(team, tmp_path, wrong):
    logged = "SELECT (SELECT count(*) FROM experiments), (SELECT count(*) FROM runs)"
    account = dict(zip(guide.login(""), guide.ADMIN))
    account |= {f"MLFLOW_TRACKING_{name}": value for name, value in wrong.items()}
    before = team.sql(logged)
    with pytest.raises(CellExecutionError) as error:
        helpers.execute(tmp_path, team.address, HOME=str(tmp_path), **account)
    assert "401" in plain(error)
    assert team.sql(logged) == before


def test_it_is_the_release_that_the_notebook_is_written_for(team):
    served = requests.get(f"{team.address}/version", auth=guide.ADMIN, timeout=30)
    pins = (helpers.ROOT / "requirements.txt").read_text().splitlines()
    assert f"mlflow=={served.text}" in pins


def test_no_other_user_of_the_machine_can_read_the_secrets(team):
    assert (team.folder / "server.env").stat().st_mode & 0o077 == 0
    assert team.folder.stat().st_mode & 0o077 == 0
    settings = (team.folder / "server.env").read_text()
    secrets = re.findall(r"(?:PASSWORD|SECRET_KEY)=(.+)", settings)
    assert len(secrets) == 3
    server = psutil.Process(team.process.pid)
    processes = [server, *server.children(recursive=True)]
    assert len(processes) > 2
    said = "\n".join(" ".join(process.cmdline()) for process in processes)
    assert not [secret for secret in secrets if secret in said]


def test_a_wrong_database_password_says_so(team, tmp_path):
    command = team.text("--env-file") + " --port 0"
    env = os.environ | {"PGPASSWORD": "wrong"}
    log, words = tmp_path / "log", guide.quote("password authentication failed")
    with log.open("w") as output:
        server = subprocess.Popen(
            ["bash", "-ec", f"exec {command}"],
            env=env,
            cwd=tmp_path,
            stdout=output,
            stderr=output,
        )
    end = time.monotonic() + 60
    try:
        while words not in log.read_text():
            assert server.poll() is None and time.monotonic() < end, log.read_text()
            time.sleep(0.1)
    finally:
        server.kill()
        server.wait()


def test_the_server_hashes_a_password_only_once_a_minute(team):
    def seconds(account):
        start = time.monotonic()
        for _ in range(10):
            requests.get(f"{team.address}/version", auth=account, timeout=30)
        return time.monotonic() - start

    seconds(guide.ADMIN)  # every worker has hashed it now
    assert seconds(guide.ADMIN) < seconds(("admin", "wrong")) / 2


def test_the_first_person_runs_the_notebook_to_its_end(team, first, sign_in):
    client = sign_in(team, "ann")
    assert client.get_registered_model(helpers.NAME).aliases["champion"]
    assert len(answers()) == 150
    assert not list(first.glob("ml*"))  # it has started no server of its own


def test_the_second_person_is_refused_and_with_two_grants_runs_to_the_end(
    team, first, tmp_path, sign_in
):
    add_person(team, "ben")
    account = guide.login("ben")
    with pytest.raises(CellExecutionError) as error:
        helpers.execute(tmp_path / "refused", team.address, **account)
    assert guide.quote("runs/create") in plain(error)
    sign_in(team, "ann")
    number = {
        '"resource_id": "1"': f'"resource_id": "{experiment_id(helpers.EXPERIMENT)}"'
    }
    team.run("users/permissions/grant", typed=f"{guide.ADMIN[1]}\n", **number)
    client = sign_in(team, "ben")
    filter_string = f"name = '{helpers.NAME}'"
    before = len(client.search_model_versions(filter_string))
    helpers.execute(tmp_path / "granted", team.address, **account)
    assert len(client.search_model_versions(filter_string)) > before
    champion = client.get_model_version_by_alias(helpers.NAME, "champion")
    with pytest.raises(MlflowException, match="Permission denied"):
        client.delete_model_version(helpers.NAME, champion.version)


def test_a_role_lets_in_everyone_who_has_it(team, first, sign_in):
    add_person(team, "eve")
    client = sign_in(team, "eve")
    experiment = experiment_id(helpers.EXPERIMENT)
    champion = client.get_model_version_by_alias(helpers.NAME, "champion").version
    for refused in (
        lambda: client.create_run(experiment),
        lambda: client.set_registered_model_alias(helpers.NAME, "champion", champion),
    ):
        with pytest.raises(MlflowException, match="Permission denied"):
            refused()
    made = team.run("roles/create", typed=f"{guide.ADMIN[1]}\n")
    role = str(json.loads(made)["role"]["id"])
    team.run("roles/assign", typed=f"{guide.ADMIN[1]}\n", ROLE=role)
    run = client.create_run(experiment)
    client.set_terminated(run.info.run_id)
    client.set_registered_model_alias(helpers.NAME, "champion", champion)
    with pytest.raises(MlflowException, match="Permission denied"):
        client.delete_model_version(helpers.NAME, champion)


def test_a_reader_loads_the_champion_and_cannot_move_it(team, first, sign_in):
    add_person(team, "ray")
    sign_in(team, "ann")
    owners = answers()
    client = sign_in(team, "ray")
    assert answers() == owners
    with pytest.raises(MlflowException, match="Permission denied"):
        client.set_registered_model_alias(helpers.NAME, "champion", "1")
    with pytest.raises(MlflowException, match="Permission denied"):
        client.delete_registered_model_alias(helpers.NAME, "champion")


def test_under_names_of_their_own_a_person_needs_no_grant(team, sign_in):
    add_person(team, "una")
    client = sign_in(team, "una")
    version = log_model("una's experiment", "una_model")
    client.set_registered_model_alias("una_model", "champion", version.version)
    assert len(answers("models:/una_model@champion")) == 150


def test_a_token_is_sent_unless_a_password_is_known(team, tmp_path, monkeypatch):
    heard = []

    class Recorder(BaseHTTPRequestHandler):
        def do_GET(self):
            heard.append(self.headers["Authorization"])
            self.send_response(404)
            self.end_headers()

        do_POST = do_GET

        def log_message(self, *_):
            pass

    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv(guide.quote("MLFLOW_TRACKING_TOKEN"), "the-token")
    with HTTPServer(("127.0.0.1", 0), Recorder) as proxy:
        threading.Thread(target=proxy.serve_forever, daemon=True).start()
        client = mlflow.MlflowClient(f"http://127.0.0.1:{proxy.server_port}")
        for _ in range(2):
            with pytest.raises(MlflowException):
                client.get_experiment("0")
            if not (tmp_path / ".mlflow").exists():
                write_credentials(team, tmp_path, "ben")
        proxy.shutdown()
    assert heard[0] == "Bearer the-token"
    assert heard[-1].startswith("Basic ")


def test_the_pages_for_accounts_are_where_the_guide_says(team):
    add_person(team, "pat")
    pat = ("pat", guide.login("pat")["MLFLOW_TRACKING_PASSWORD"])
    with helpers.browser() as browser:
        for path, account, button in [
            ("/#/admin", guide.ADMIN, "Create User"),
            ("/#/account", pat, "Change password"),
        ]:
            assert guide.quote(path).endswith(path)
            account = dict(zip(("username", "password"), account))
            page = browser.new_page(http_credentials=account, ignore_https_errors=True)
            page.goto(team.public + path)
            expect(page.get_by_role("button", name=button)).to_be_visible()


def test_a_browser_at_the_public_address_may_list_the_runs_and_no_other_may(team):
    asked = {"json": {"experiment_ids": ["0"]}, "auth": guide.ADMIN}
    trusted = {"verify": team.certificate, "timeout": 30}

    def answer(**headers):
        runs = f"{team.public}/ajax-api/2.0/mlflow/runs/search"
        return requests.post(runs, headers=headers, **asked, **trusted)

    assert answer(Origin=team.public).ok
    for headers, words in {
        ("Origin", "https://elsewhere.example.com"): "Cross-origin",
        ("Origin", f"https://{guide.PUBLIC}"): "Cross-origin",  # the port is missing
        ("Host", "elsewhere.example.com"): "Invalid Host header",
        ("Host", guide.PUBLIC): "Invalid Host header",
    }.items():
        refused = answer(**dict([headers]))
        assert refused.status_code == 403
        assert guide.quote(words) in refused.text
    assert requests.get(f"{team.address}/version", auth=guide.ADMIN, timeout=30).ok


def test_a_large_file_passes_the_proxy(team, tmp_path, monkeypatch, sign_in):
    add_person(team, "lea")
    large = tmp_path / "large.bin"
    large.write_bytes(bytes(3_000_000))
    sign_in(team, "lea")
    monkeypatch.setenv("MLFLOW_TRACKING_SERVER_CERT_PATH", str(team.certificate))
    monkeypatch.setenv("MLFLOW_TRACKING_URI", team.public)
    mlflow.set_tracking_uri(team.public)
    with mlflow.start_run(experiment_id=experiment_id("large files")) as run:
        mlflow.log_artifact(large)
    stored = mlflow.artifacts.download_artifacts(
        f"runs:/{run.info.run_id}/large.bin", dst_path=str(tmp_path / "back")
    )
    assert Path(stored).read_bytes() == large.read_bytes()


def test_without_the_body_limit_nginx_refuses_a_large_file(team):
    limited = guide.Server(team.folder / "limited", team.administrator)
    limited.address = team.address
    with limited.nginx(without="client_max_body_size 0;"):
        refused = requests.put(
            f"{limited.public}/api/2.0/mlflow-artifacts/artifacts/large.bin",
            data=bytes(1_100_000),
            verify=limited.certificate,
            timeout=30,
        )
    assert guide.quote("413") in refused.text
    assert guide.quote("413").startswith(str(refused.status_code))


def test_killed_and_started_from_another_folder_it_is_the_same_server(
    team, first, tmp_path, sign_in
):
    sign_in(team, "ann")
    before = answers()
    settings = team.folder / "server.env"
    written = settings.read_text()
    settings.write_text(re.sub("MLFLOW_AUTH_ADMIN_PASSWORD=.*\n", "", written))
    accounts = team.sql("SELECT username, password_hash FROM users ORDER BY 1")
    runs = team.sql("SELECT run_uuid FROM runs ORDER BY 1")
    team.restart(tmp_path)
    assert team.sql("SELECT username, password_hash FROM users ORDER BY 1") == accounts
    assert team.sql("SELECT run_uuid FROM runs ORDER BY 1") == runs
    assert requests.get(f"{team.address}/version", auth=guide.ADMIN, timeout=30).ok
    assert answers() == before
    assert [path.name for path in tmp_path.iterdir()] == ["server.log"]


def test_a_restored_server_at_another_address_serves_the_same_champion(
    team, first, tmp_path, sign_in
):
    sign_in(team, "ann")
    before = answers()
    team.run("pg_dump", cwd=tmp_path)
    for backup in ("mlflow.dump", "mlflow-files.tar"):
        assert (tmp_path / backup).stat().st_mode & 0o077 == 0
    restored = guide.Server(tmp_path / "new", team.administrator, "mlflow_restored")
    restored.make_database()
    # copied in seconds, where pip, which then finds everything there, takes a minute
    shutil.copytree(team.folder / ".venv", restored.folder / ".venv", symlinks=True)
    restored.run("pip install -r /srv", cwd=tmp_path)
    for name in ("server.env", "auth.ini"):
        text = (restored.folder / name).read_text()
        text = text.replace(str(team.folder), str(restored.folder))
        text = text.replace(team.uri, restored.uri)
        text = text.replace(
            helpers.port_of(team.address), helpers.port_of(restored.address)
        )
        (restored.folder / name).write_text(text)
    assert (restored.folder / "server.env").stat().st_mode & 0o077 == 0
    restored.run("pg_restore", cwd=tmp_path)
    grants = "SELECT role_id, resource_type, resource_pattern, permission FROM role_permissions ORDER BY id"
    assert restored.sql(grants) == team.sql(grants) != ""
    kept = team.folder / "artifacts"
    away = kept.rename(team.folder / "away")  # its files are of no use to the restored
    try:
        with restored.running(tmp_path):
            client = sign_in(restored, "ann")
            assert answers() == before
            version = client.get_model_version_by_alias(
                helpers.NAME, "champion"
            ).version
            client.set_registered_model_alias(helpers.NAME, "champion", version)
            assert client.search_runs([experiment_id(helpers.EXPERIMENT)])
    finally:
        away.rename(kept)


def test_after_the_clean_up_a_version_loads_unless_its_logged_model_is_gone(
    team, tmp_path, sign_in
):
    add_person(team, "gus")
    client = sign_in(team, "gus")
    orphan, broken = (log_model("clean up", name) for name in ("orphan", "broken"))
    recent = log_model("clean up", "recent")
    before = answers("models:/orphan/1")
    folder = team.folder / "artifacts"
    (note,) = folder.glob(f"*/{orphan.run_id}/**/note.txt")
    client.delete_run(orphan.run_id)
    client.delete_logged_model(broken.source.split("/")[1])
    month = 31 * 24 * 3600 * 1000  # as if they had been deleted so long ago
    team.sql(f"UPDATE runs SET deleted_time = deleted_time - {month}::bigint")
    team.sql(
        "UPDATE logged_models SET last_updated_timestamp_ms = last_updated_timestamp_ms"
        f" - {month}::bigint WHERE lifecycle_stage = 'deleted'"
    )
    client.delete_run(recent.run_id)
    said = team.run("mlflow gc", typed=f"{guide.ADMIN[1]}\n", cwd=tmp_path)
    assert orphan.run_id in said and broken.source.split("/")[1] in said
    assert recent.run_id not in said and not note.exists()
    client.restore_run(recent.run_id)
    with pytest.raises(MlflowException):
        client.get_run(orphan.run_id)
    assert answers("models:/orphan/1") == before
    with pytest.raises(MlflowException) as error:
        answers("models:/broken/1")
    assert guide.quote("MLmodel") in str(error.value)
    assert client.get_model_version("broken", "1").status == "READY"


def test_a_database_of_an_older_release_is_upgraded_and_its_champion_answers(
    team, tmp_path, sign_in
):
    old = guide.Server(tmp_path, team.administrator, "mlflow_older")
    old.make_database()
    old.warm("mlflow[auth]==3.10.1", "psycopg2-binary")
    old.write_settings()
    for name in ("server.env", "auth.ini"):
        text = (old.folder / name).read_text()
        text = text.replace("postgresql://", "postgresql+psycopg2://")
        (old.folder / name).write_text(text)
    settings = configparser.ConfigParser()
    settings.read(old.folder / "auth.ini")
    settings["mlflow"]["admin_password"] = guide.ADMIN[1]
    settings["mlflow"]["authorization_function"] = (
        "mlflow.server.auth:authenticate_request_basic_auth"
    )
    with (old.folder / "auth.ini").open("w") as file:
        settings.write(file)
    with old.running(tmp_path, "older.log"):
        assert requests.get(f"{old.address}/version", auth=guide.ADMIN).text == "3.10.1"
        user = {"username": "ann", "password": "change-me-ann"}
        create = f"{old.address}/api/2.0/mlflow/users/create"
        requests.post(create, json=user, auth=guide.ADMIN).raise_for_status()
        client = sign_in(old, "ann")
        version = log_model(helpers.EXPERIMENT, helpers.NAME)
        client.set_registered_model_alias(helpers.NAME, "champion", version.version)
        before = answers()
    revision = old.sql("SELECT version_num FROM alembic_version")
    old.write_settings()
    (old.folder / "requirements.txt").touch()
    old.run("pg_dump", cwd=tmp_path)
    old.run("mlflow db upgrade", cwd=tmp_path)
    assert old.sql("SELECT version_num FROM alembic_version") != revision
    with old.running(tmp_path):
        assert (
            "3.10" not in requests.get(f"{old.address}/version", auth=guide.ADMIN).text
        )
        sign_in(old, "ann")
        assert answers() == before


def test_with_s3_every_file_is_in_the_bucket_and_the_old_champion_too(
    team, first, tmp_path, sign_in
):
    sign_in(team, "ann")
    before = answers()
    moto = [sys.executable, *MOTO.split(), helpers.port_of(team.store)]
    settings = team.folder / "server.env"
    with helpers.running(moto, team.store, tmp_path / "moto.log"):
        bucket = f"{team.store}/mlflow"
        requests.put(bucket, timeout=30).raise_for_status()
        folder = team.folder / "artifacts"
        for file in filter(Path.is_file, folder.rglob("*")):
            key = file.relative_to(team.folder)
            requests.put(f"{bucket}/{key}", data=file.read_bytes(), timeout=30)
        folder.rename(team.folder / "no longer used")
        team.run("pip install boto3")
        text = re.sub("MLFLOW_ARTIFACTS_DESTINATION=.*\n", "", settings.read_text())
        settings.write_text(text + team.text("S3_ENDPOINT_URL") + "\n")
        team.restart(tmp_path)
        assert answers() == before

        def stored(ending):
            listed = requests.get(f"{bucket}?list-type=2", timeout=30).text
            assert "<IsTruncated>false" in listed
            return len(re.findall(rf"<Key>artifacts/[^<]*{ending}<", listed))

        endings = "/model.skops", ".png"
        counts = [stored(ending) for ending in endings]
        helpers.execute(tmp_path / "ann", team.address, **guide.login("ann"))
        for ending, count in zip(endings, counts):
            assert stored(ending) >= count + 2
    assert not folder.exists()
