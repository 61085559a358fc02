"""The server that nbval's kernel and the tests use, and a tidy checkout."""

import os
import shutil
import tempfile
from contextlib import ExitStack
from functools import cache
from pathlib import Path

for name in [name for name in os.environ if name.startswith(("MLFLOW_", "AWS_"))]:
    del os.environ[name]  # a team's variables must not lead these tests into its stores
os.environ["MLFLOW_DISABLE_TELEMETRY"] = "true"  # the tests call this machine alone
os.environ["no_proxy"] = os.environ["NO_PROXY"] = "127.0.0.1,localhost"

import helpers
import mlflow
import pytest

STARTED = ExitStack()


@cache
def server():
    """Start the MLflow server of this test run; return its address."""
    folder = Path(STARTED.enter_context(tempfile.TemporaryDirectory()))
    return STARTED.enter_context(helpers.mlflow_server(folder))


@pytest.fixture(scope="session")
def client():
    """A client of the server, after the notebook was executed: by nbval, or else here."""
    client = mlflow.MlflowClient(server())
    if not client.search_registered_models():
        with tempfile.TemporaryDirectory() as folder:
            helpers.execute(Path(folder), server())
    return client


@pytest.fixture
def folder(tmp_path):
    """A copy of the project in a folder whose name has spaces and letters beyond ASCII."""
    made = ["mlflow.db", "mlartifacts", "mlflow-server.log", "output"]
    ignored = shutil.ignore_patterns(".[!g]*", ".git", "__pycache__", *made)
    return shutil.copytree(
        helpers.ROOT, tmp_path / "Mappe mit Wörtern 花", ignore=ignored
    )


def pytest_runtest_protocol(item):
    """Give nbval's kernel the server. `pytest --nbval project.ipynb` does not load this file: for the
    notebook alone, add `-k project.ipynb` to README's command."""
    os.environ.pop("MLFLOW_TRACKING_URI", None)
    if item.path.suffix == ".ipynb":
        item.add_marker(
            pytest.mark.skipif(not helpers.online(), reason=helpers.NO_NETWORK)
        )
        os.environ["MLFLOW_TRACKING_URI"] = server()


def checkout():
    """Return the files of the project's folder, with their contents, without what tools cache."""
    tools = {
        ".venv",
        ".git",
        ".pytest_cache",
        ".ruff_cache",
        "__pycache__",
        ".ipynb_checkpoints",
    }
    found = [path for path in helpers.ROOT.rglob("*") if not tools & set(path.parts)]
    return {path: path.read_bytes() if path.is_file() else None for path in found}


def pytest_configure(config):
    config.addinivalue_line("markers", "slow: needs minutes, or installs something")
    config.checkout = checkout()


def pytest_collection_modifyitems(items):
    items.sort(
        key=lambda item: item.path.name == "test_exercises.py"
    )  # the others count runs


def pytest_sessionfinish(session):
    STARTED.close()
    before, after = session.config.checkout, checkout()
    changed = [
        str(path)
        for path in before | after
        if before.get(path, 0) != after.get(path, 0)
    ]
    if changed and not os.environ.get("SAVE_PICTURES"):
        session.exitstatus = pytest.ExitCode.TESTS_FAILED
        print(f"\nThe tests have changed the checkout: {', '.join(changed)}")
