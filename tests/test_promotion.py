"""Which version becomes champion, and what must happen before: the notebook, edited, on a server."""

import sysconfig
import time

import mlflow
import pytest
from nbclient.exceptions import CellExecutionError
from sklearn.datasets import load_iris
from sklearn.linear_model import LogisticRegression
from suite import NO_GUESS, execute, free_port


@pytest.fixture
def model_name(tmp_path):
    """A name for the registered model that nobody else uses."""
    return tmp_path.name


@pytest.fixture
def run_all(tmp_path, model_name):
    """A function that executes the notebook to its rule, under that name, with more edits."""

    def run_all(edits=(), **env):
        own = NO_GUESS | {"load-data": ("tracking_quick_start", model_name)}
        return execute(tmp_path, own | dict(edits), "promote", **env)

    return run_all


def champion(client, model_name):
    """Return the number of the version that is champion, or None."""
    return client.get_registered_model(model_name).aliases.get("champion")


@pytest.mark.parametrize(
    ("factor", "expected"), [("0.0001", "1"), ("1", "3")], ids=["worse", "better"]
)
def test_only_a_better_model_takes_over_from_a_champion(
    client, model_name, run_all, factor, expected
):
    """The champion, which the test registers, lies between the notebook's two models."""
    X, y = load_iris(as_frame=True, return_X_y=True)
    names = load_iris().target_names[y]
    with mlflow.start_run():
        model = LogisticRegression(C=3, max_iter=1000).fit(X, names)
        logged = mlflow.sklearn.log_model(model, name="model", pip_requirements=[])
    mlflow.register_model(logged.model_uri, model_name)
    client.set_registered_model_alias(model_name, "champion", "1")
    run_all({"run-newton-cg": (" C=", f" C={factor} * ")})
    assert champion(client, model_name) == expected
    tags = [client.get_model_version(model_name, number).tags for number in "123"]
    assert tags == [{}, *[{"fresh_environment": "passed"}] * 2]


def test_a_second_run_all_adds_two_versions_and_moves_nothing(client, tmp_path):
    notebook = execute(tmp_path, NO_GUESS)
    assert "version 4: 0.0758 against 0.0758, checked=True, wins=False" in str(notebook)
    assert len(client.search_model_versions("name = 'tracking_quick_start'")) == 4
    assert champion(client, "tracking_quick_start") == "2"


REPLACE_LIST = """
with open("{folder}/requirements.txt", "w") as file:
    print("{packages}", file=file)
client = mlflow.MlflowClient()
client.log_model_artifacts(first.model_id, "{folder}")
"""


@pytest.mark.parametrize(
    ("packages", "words"),
    [
        ("skops", "No module named 'mlflow'"),
        ("skops==0.0.0.1", "No solution found"),
        (None, "The answers differ"),
    ],
    ids=["a list without mlflow", "a list that nobody can meet", "other answers"],
)
def test_a_version_that_fails_the_check_stops_the_page_and_gets_no_tag(
    client, model_name, run_all, tmp_path, packages, words
):
    """What is installed here must be of no help, even where PYTHONPATH names it."""
    (tmp_path / "changed").mkdir()
    edit = REPLACE_LIST.format(folder="changed", packages=packages)
    edits = {"read-requirements": edit} if packages else {}
    if not packages:
        edits["define-elsewhere"] = ('["predictions"]', '["predictions"][::-1]')
    installed = sysconfig.get_path("purelib")
    with pytest.raises(CellExecutionError, match=words):
        run_all(edits, PYTHONPATH=installed, PYTHONOPTIMIZE="1")
    versions = client.search_model_versions(f"name = '{model_name}'")
    assert [version.tags for version in versions] == [{}, {}]


def test_an_unchecked_version_is_not_promoted(client, model_name, run_all):
    notebook = run_all({"check-versions": ("check(second", "# check(second")})
    assert champion(client, model_name) == "1"
    assert "version 2: 0.0758 against 0.1589, checked=False" in str(notebook)


def test_without_a_server_the_page_says_so_in_seconds_below_the_address(tmp_path):
    address, start = f"http://127.0.0.1:{free_port()}", time.monotonic()
    with pytest.raises(CellExecutionError) as stopped:
        execute(tmp_path, until="connect", MLFLOW_TRACKING_URI=address)
    assert f"Connecting to {address}" in str(stopped.value)
    assert "Max retries exceeded" in str(stopped.value)
    assert time.monotonic() - start < 60  # MLflow's own deadline is four minutes
