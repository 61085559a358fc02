"""Which version becomes champion, and what must happen before: the notebook, edited, on a server."""

import sysconfig
import time

import mlflow
import pytest
from nbclient.exceptions import CellExecutionError
from sklearn.datasets import load_iris
from sklearn.linear_model import LogisticRegression
from suite import SHORT, execute, free_port, shown


@pytest.fixture
def model_name(tmp_path):
    """A name for the registered model that nobody else uses."""
    return tmp_path.name


@pytest.fixture
def run_all(tmp_path, model_name):
    """A function that executes the notebook to its rule, under that name, with more edits."""

    def run_all(edits, **options):
        own = SHORT | {"load-data": ("tracking_quick_start", model_name)}
        return execute(tmp_path, own | edits, "promote", **options)

    return run_all


def champion(client, model_name):
    """Return the number of the version that is champion, or None."""
    return client.get_registered_model(model_name).aliases.get("champion")


BETTER = """
model.set_params(C=10.0)
better = train_and_log("better", model, "a test's")
version = mlflow.register_model(better.model_uri, model_name).version
check(version)
promote(version)
"""


def test_only_a_better_model_takes_over_from_a_champion(client, model_name, run_all):
    """The champion, which the test registers, lies between the two that are checked."""
    X, y = load_iris(as_frame=True, return_X_y=True)
    names = load_iris().target_names[y]
    with mlflow.start_run():
        model = LogisticRegression(C=3, max_iter=1000).fit(X, names)
        logged = mlflow.sklearn.log_model(model, name="model", pip_requirements=[])
    mlflow.register_model(logged.model_uri, model_name)
    client.set_registered_model_alias(model_name, "champion", "1")
    edits = {"run-newton-cg": ('", C=', '", C=0.0001 * ')}
    edits["check-versions"] = ("check(first", "# check(first")
    notebook = run_all(edits, add=[BETTER])
    assert shown(notebook, "promote").endswith("{'champion': '1'}")
    assert champion(client, model_name) == "4"
    tags = [client.get_model_version(model_name, number).tags for number in "1234"]
    assert tags == [{}, {}, *[{"fresh_environment": "passed"}] * 2]


def test_a_second_run_all_adds_two_versions_and_moves_nothing(client, tmp_path):
    notebook = execute(tmp_path, SHORT)
    assert "version 4: 0.0758 against 0.0758, checked=True, wins=False" in str(notebook)
    assert len(client.search_model_versions("name = 'tracking_quick_start'")) == 4
    assert champion(client, "tracking_quick_start") == "2"


ATTEMPTS = """
def attempt(version, packages=None):
    if packages:
        with open("{folder}/requirements.txt", "w") as file:
            print(packages, file=file)
        client.log_model_artifacts(first.model_id, "{folder}")
    try:
        check(version)
    except RuntimeError as error:
        print(error)


attempt(first_version.version, "skops")
attempt(first_version.version, "skops==0.0.0.1")
elsewhere = predict_elsewhere
predict_elsewhere = lambda *given: elsewhere(*given)[::-1]
attempt(second_version.version)
"""


def test_a_version_that_fails_its_check_gets_neither_tag_nor_alias(
    client, model_name, run_all, tmp_path
):
    """What is installed here must be of no help, even where PYTHONPATH names it."""
    (tmp_path / "changed").mkdir()
    checks = "check(first_version.version)\ncheck(second_version.version)"
    edit = {"check-versions": (checks, ATTEMPTS.format(folder="changed"))}
    installed = sysconfig.get_path("purelib")
    notebook = run_all(edit, PYTHONPATH=installed, PYTHONOPTIMIZE="1")
    errors = shown(notebook, "check-versions")
    assert "No module named 'mlflow'" in errors  # the first list lacks it
    assert "No solution found" in errors  # uv's words: nobody can meet the second
    assert "The answers differ" in errors
    versions = client.search_model_versions(f"name = '{model_name}'")
    assert [version.tags for version in versions] == [{}, {}]
    verdict = "version 2: 0.0758 against 1.0986, checked=False, wins=True"
    assert verdict in shown(notebook, "promote")
    assert champion(client, model_name) is None


def test_without_a_server_the_page_says_so_in_seconds_below_the_address(tmp_path):
    address, start = f"http://127.0.0.1:{free_port()}", time.monotonic()
    with pytest.raises(CellExecutionError) as stopped:
        execute(tmp_path, until="connect", MLFLOW_TRACKING_URI=address)
    assert f"Connecting to {address}" in str(stopped.value)
    assert "Max retries exceeded" in str(stopped.value)
    assert time.monotonic() - start < 60  # MLflow's own deadline is four minutes
