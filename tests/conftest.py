"""The server that nbval's kernel and the tests use, the option --slow, and a tidy checkout."""

import os
import tempfile
from contextlib import ExitStack
from functools import cache
from pathlib import Path

for name in [name for name in os.environ if name.startswith("MLFLOW_")]:
    del os.environ[name]  # a team's variables must not lead these tests into its database
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
    helpers.need_network()
    client = mlflow.MlflowClient(server())
    if not client.search_registered_models():
        with tempfile.TemporaryDirectory() as folder:
            helpers.execute(Path(folder), server())
    return client


@pytest.hookimpl(tryfirst=True)  # before nbval starts its kernel, which inherits the address
def pytest_runtest_setup(item):
    if item.path.suffix == ".ipynb":
        helpers.need_network()
        os.environ["MLFLOW_TRACKING_URI"] = server()
        # Where ipykernel sees this one, it leaves what child processes print out of the cells.
        os.environ.pop("PYTEST_CURRENT_TEST", None)
    else:
        os.environ.pop("MLFLOW_TRACKING_URI", None)


def pytest_addoption(parser):
    parser.addoption("--slow", action="store_true", help="run the slow tests as well")


def pytest_configure(config):
    config.addinivalue_line("markers", "slow: needs minutes, or installs something")


def pytest_collection_modifyitems(config, items):
    """Leave the slow tests out, unless --slow, -m or a node id asks for them."""
    asked = config.option.slow or config.option.markexpr
    if not asked and not any("::" in argument for argument in config.args):
        slow = [item for item in items if item.get_closest_marker("slow")]
        config.hook.pytest_deselected(items=slow)
        items[:] = [item for item in items if item not in slow]


def checkout():
    """Return the files of the project's folder, with their contents, without what tools cache."""
    tools = {".venv", ".git", ".pytest_cache", ".ruff_cache", "__pycache__", ".ipynb_checkpoints"}
    found = [path for path in helpers.ROOT.rglob("*") if not tools & set(path.parts)]
    return {path: path.read_bytes() if path.is_file() else None for path in found}


def pytest_sessionstart(session):
    session.config.checkout = checkout()


def pytest_sessionfinish(session):
    STARTED.close()
    before, after = session.config.checkout, checkout()
    changed = [str(path) for path in before | after if before.get(path, 0) != after.get(path, 0)]
    if changed and not os.environ.get("SAVE_PICTURES"):
        session.exitstatus = pytest.ExitCode.TESTS_FAILED
        print(f"\nThe tests have changed the checkout: {', '.join(changed)}")
