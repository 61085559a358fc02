"""The guide's ten steps, in order, on one server: each test needs those before it."""

import os
import re
import sys
import time
from pathlib import Path

import mlflow
import psutil
import pytest
import requests
from mlflow.exceptions import MlflowException
from nbclient.exceptions import CellExecutionError
from sklearn.datasets import load_iris
from suite import execute, free_port, running

pytestmark = pytest.mark.slow
NAME = "tracking_quick_start"
MOTO = "-m uv tool run --quiet --from moto[server]==5.2.5 moto_server --host 127.0.0.1 --port"


def answers():
    """Return what the champion says about 150 flowers, loaded anew from the server."""
    flowers = load_iris(as_frame=True).data
    return (
        mlflow.pyfunc.load_model(f"models:/{NAME}@champion").predict(flowers).tolist()
    )


def test_no_other_user_of_the_machine_can_read_the_secrets(team):
    for path in (team.folder, team.folder / "server.env"):
        assert path.stat().st_mode & 0o077 == 0
    settings = (team.folder / "server.env").read_text()
    secrets = re.findall(r"(?:PASSWORD|SECRET_KEY)=(.+)", settings)
    assert len(secrets) == 3
    server = psutil.Process(team.process.pid)
    processes = [server, *server.children(recursive=True)]
    assert len(processes) > 2
    said = " ".join(word for process in processes for word in process.cmdline())
    assert not [secret for secret in secrets if secret in said]


def test_the_server_is_the_notebooks_release_and_wants_a_password(team):
    asked = f"{team.url}/version"
    assert requests.get(asked, timeout=30).status_code == 401
    release = requests.get(asked, auth=team.admin, timeout=30).text
    pins = Path(__file__).parents[2] / "requirements.txt"
    assert f"mlflow=={release}" in pins.read_text().split()


def test_the_server_sends_no_usage_data(team):
    variables = psutil.Process(team.process.pid).environ()
    assert variables["MLFLOW_DISABLE_TELEMETRY"] == "true"


@pytest.mark.parametrize(
    ("header", "value", "status"),
    [
        ("Host", "mlflow.example.com", 200),
        ("Host", "mlflow.invalid", 403),
        ("Origin", "https://mlflow.example.com", 200),
        ("Origin", "https://mlflow.invalid", 403),
    ],
)
def test_a_request_to_another_host_or_from_another_page_is_refused(
    team, header, value, status
):
    answer = requests.post(
        f"{team.url}/ajax-api/2.0/mlflow/runs/search",
        json={"experiment_ids": ["0"]},
        headers={header: value},
        auth=team.admin,
        timeout=30,
    )
    assert answer.status_code == status


def test_a_right_password_is_remembered(team):
    def seconds(account):
        start = time.monotonic()
        for _ in range(10):
            requests.get(f"{team.url}/version", auth=account, timeout=30)
        return time.monotonic() - start

    seconds(team.admin)  # every worker has hashed it now
    assert seconds(team.admin) < seconds(("admin", "wrong")) / 2


def test_the_first_person_runs_the_notebook_to_its_end(team, tmp_path, sign_in):
    home = {"HOME": str(tmp_path / "ann")}
    (tmp_path / "ann").mkdir()
    team.add("ann")
    team.run("~/.mlflow", env=home)
    credentials = tmp_path / "ann/.mlflow/credentials"
    assert credentials.stat().st_mode & 0o077 == 0
    credentials.write_text(team.block("mlflow_tracking_username"))
    variable = team.block("export ").split()[1].split("=")[0]
    cache = os.environ.get("XDG_CACHE_HOME", str(Path.home() / ".cache"))  # uv's too
    execute(tmp_path / "work", XDG_CACHE_HOME=cache, **home, **{variable: team.url})
    assert not list((tmp_path / "work").glob("ml*"))  # all of it went to the server
    sign_in(team, "ann")
    assert len(answers()) == 150


def test_the_second_person_reads_everything_and_owns_what_is_theirs(team, sign_in):
    sign_in(team, "ann")
    owners = answers()
    team.add("ben")
    client = sign_in(team, "ben")
    assert answers() == owners
    with pytest.raises(MlflowException, match="Permission denied"):
        client.set_registered_model_alias(NAME, "champion", "1")
    client.create_run(client.create_experiment("ben's"))
    client.create_registered_model("ben's")
    client.set_registered_model_tag("ben's", "mine", "yes")


def test_the_second_person_needs_two_grants(team, tmp_path, sign_in):
    client = sign_in(team, "ben")
    with pytest.raises(CellExecutionError) as stopped:
        execute(tmp_path, MLFLOW_TRACKING_URI=team.url)
    assert team.block("runs/create") in re.sub(r"\x1b\[[\d;]*m", "", str(stopped.value))
    team.run('"experiment"', typed=f"{team.admin[1]}\n")
    team.run('"registered_model"', typed="change-me-ann\n", **{"-u admin": "-u ann"})
    experiment = client.get_experiment_by_name("mlflow quickstart")
    client.set_terminated(client.create_run(experiment.experiment_id).info.run_id)
    champion = client.get_model_version_by_alias(NAME, "champion").version
    client.set_registered_model_alias(NAME, "champion", champion)
    client.set_model_version_tag(NAME, champion, "seen by", "ben")
    with pytest.raises(MlflowException, match="Permission denied"):
        client.delete_model_version(NAME, champion)


def test_a_restored_server_elsewhere_has_the_same_champion_accounts_and_grants(
    team, machine, tmp_path, sign_in
):
    sign_in(team, "ann")
    before = answers()
    team.run("pg_dump", cwd=tmp_path)
    for backup in ("mlflow.dump", "mlflow-files.tar"):
        assert (tmp_path / backup).stat().st_mode & 0o077 == 0
    restored = machine("restored")
    restored.make_database()
    restored.warm("-r", team.folder / "requirements.txt")
    restored.run("tar -xf", cwd=tmp_path)
    for name in ("server.env", "auth.ini"):
        file = restored.folder / name
        text = file.read_text()
        for old, new in zip(team.names.values(), restored.names.values()):
            text = text.replace(old, new)
        file.write_text(text)
    assert (restored.folder / "server.env").stat().st_mode & 0o077 == 0
    restored.run("pg_restore", cwd=tmp_path)
    for query in ("SELECT * FROM users", "SELECT * FROM role_permissions"):
        assert restored.sql(query) == team.sql(query) != ""
    kept = team.folder / "artifacts"
    away = kept.rename(team.folder / "away")  # nothing of the old server's is of use
    try:
        restored.start(tmp_path)
        client = sign_in(restored, "ben")
        assert answers() == before
        client.set_model_version_tag(NAME, "1", "seen by", "ben, again")
    finally:
        restored.stop()
        away.rename(kept)


def test_an_upgrade_of_a_current_database_changes_nothing(team, tmp_path):
    def state():
        packages = (team.folder / "requirements.txt").read_text()
        return packages, team.sql("SELECT * FROM alembic_version")

    before = state()
    team.stop()
    (team.folder / "requirements.txt").unlink()
    team.run("mlflow db upgrade", cwd=tmp_path)
    assert state() == before


def test_with_s3_old_versions_load_and_the_second_persons_files_are_in_the_bucket(
    team, tmp_path, sign_in
):
    port = str(free_port())
    store = f"http://127.0.0.1:{port}"
    moto = [sys.executable, *MOTO.split(), port]
    settings = team.folder / "server.env"
    with running(moto, store, tmp_path / "moto.log"):
        bucket = f"{store}/mlflow"
        requests.put(bucket, timeout=30).raise_for_status()
        folder = team.folder / "artifacts"
        for file in filter(Path.is_file, folder.rglob("*")):
            key = file.relative_to(team.folder)
            requests.put(f"{bucket}/{key}", data=file.read_bytes(), timeout=30)
        folder.rename(tmp_path / "no longer used")
        text = re.sub(
            ".*(ARTIFACTS_DESTINATION|ADMIN_PASSWORD)=.*\n", "", settings.read_text()
        )
        text += team.block("S3_ENDPOINT_URL", **{"9000": port}) + "\n"
        settings.write_text(text)
        elsewhere = tmp_path / "elsewhere"
        elsewhere.mkdir()
        team.start(elsewhere)
        client = sign_in(team, "ben")
        assert len(answers()) == 150

        def stored():
            listed = requests.get(f"{bucket}?list-type=2", timeout=30).text
            assert "<IsTruncated>false" in listed
            return set(re.findall("<Key>(artifacts/[^<]*)<", listed))

        before = stored()
        versions = len(client.search_model_versions(f"name = '{NAME}'"))
        execute(tmp_path / "ben", until="register", MLFLOW_TRACKING_URI=team.url)
        new = {key.rsplit("/")[-1] for key in stored() - before}
        assert {"MLmodel", "model.skops", "requirements.txt"} <= new
        assert len(client.search_model_versions(f"name = '{NAME}'")) > versions
        assert requests.get(f"{team.url}/version", auth=team.admin, timeout=30).ok
        team.stop()
    assert not folder.exists()
    assert [path.name for path in elsewhere.iterdir()] == ["server.log"]


def test_every_block_of_the_guide_was_used(unused_blocks):
    assert unused_blocks == set()
