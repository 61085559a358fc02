"""pytest without options: nbval executes the notebook and compares it, then come the quick tests.

`pytest project.ipynb` does not load this file, because it looks for a conftest.py only beside what
is named, or in test* where nothing is: `-k ipynb` chooses the notebook.
"""

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
from nbval.plugin import IPyNbCell, IPyNbFile

NOTEBOOK = helpers.ROOT / "project.ipynb"
STARTED = ExitStack()


@cache
def server():
    """Start the MLflow server to which nbval's kernel logs; return its address."""
    folder = Path(STARTED.enter_context(tempfile.TemporaryDirectory()))
    return STARTED.enter_context(helpers.mlflow_server(folder))


@pytest.fixture(scope="session")
def client():
    """A client of that server. With a test that asks for it, the whole notebook is run first."""
    return mlflow.MlflowClient(server())


@pytest.fixture
def folder(tmp_path):
    """A copy of the project in a folder whose name has spaces and letters beyond ASCII."""
    made = ["mlflow.db", "mlartifacts", "mlflow-server.log", "output"]
    ignored = shutil.ignore_patterns(".[!g]*", ".git", "__pycache__", *made)
    return shutil.copytree(
        helpers.ROOT, tmp_path / "Mappe mit Wörtern 花", ignore=ignored
    )


class Notebook(IPyNbFile):
    """nbval's notebook, with the server of these tests; it remembers all its cells."""

    def collect(self):
        """Return nbval's test of each cell."""
        self.cells = list(super().collect())
        return self.cells

    def setup(self):
        """Start the kernel."""
        os.environ["MLFLOW_TRACKING_URI"] = server()
        del os.environ["PYTEST_CURRENT_TEST"]  # or ipykernel hides what uv prints
        super().setup()
        del os.environ["MLFLOW_TRACKING_URI"]


class Hooks:
    """What pytest asks of a conftest.py only for the files in its own folder."""

    def pytest_collect_file(self, file_path, parent):
        """Collect the notebook, whether or not anybody says --nbval."""
        if file_path == NOTEBOOK:
            return Notebook.from_parent(parent, path=file_path)

    def pytest_runtest_makereport(self, item, call):
        """Where a cell fails, show also what it printed, as uv's words on why it does."""
        if isinstance(item, IPyNbCell) and call.when == "call" and call.excinfo:
            printed = "".join(out.get("text", "") for out in item.test_outputs or [])
            item.add_report_section("call", "by the cell", printed)


def pytest_configure(config):
    """Set nbval's options, and leave the slow tests out where nobody has chosen any."""
    config.addinivalue_line("markers", "slow: needs minutes, or installs something")
    config.option.nbval = False  # it would collect the notebook a second time
    config.option.nbval_sanitize_with = helpers.ROOT / "tests" / "sanitize.cfg"
    names_a_file = any(Path(arg.split("::")[0]).is_file() for arg in config.args)
    has_m = any(arg.startswith("-m") for arg in config.invocation_params.args)
    if not (has_m or names_a_file or config.option.keyword):
        config.option.markexpr = "not slow"
    config.pluginmanager.register(Hooks())
    config.checkout = checkout()


@pytest.hookimpl(tryfirst=True)
def pytest_collection_finish(session):
    """Run the notebook first: all of it where a test asks what it logged, else to the last cell chosen."""
    cells = [item for item in session.items if isinstance(item, IPyNbCell)]
    tests = [item for item in session.items if item not in cells]
    last = max((cell.cell_num for cell in cells), default=-1)
    if any("client" in item.fixturenames for item in tests):
        last = None
        if not cells:
            cells = Notebook.from_parent(session, path=NOTEBOOK).collect()
    if cells:
        needed = cells[0].parent.cells
        session.items[:] = needed[: len(needed) if last is None else last + 1] + tests


def checkout():
    """Return the files of the project's folder but the hidden ones, with their times and sizes."""
    found = {}
    for folder, folders, files in os.walk(helpers.ROOT):
        folders[:] = [name for name in folders if name[0] not in "._"]
        found |= dict.fromkeys(Path(folder, name) for name in folders)
        for path in (Path(folder, name) for name in files if name[0] != "."):
            stat = path.lstat()
            found[path] = (stat.st_mtime_ns, stat.st_size)
    return found


def pytest_sessionfinish(session):
    """Stop the server. No test may change the checkout."""
    STARTED.close()
    before, after = session.config.checkout, checkout()
    changed = {path for path, _ in before.items() ^ after.items()}
    if changed and not os.environ.get("SAVE_PICTURES"):
        session.exitstatus = pytest.ExitCode.TESTS_FAILED
        print(f"\nThe tests have changed the checkout: {sorted(map(str, changed))}")
