"""README's commands, run as they stand there."""

import os
import re
import subprocess
import sys

import helpers
import nbformat
import pytest
from helpers import (
    FIRST,
    SCRIPTS,
    commands,
    loopback,
    need_ports,
    port_of,
    section,
    shell,
)
from test_server import experiments, refused, start

pytestmark = pytest.mark.slow


def test_jupyter_and_both_commands_work_also_beside_a_pip_that_no_index_has(folder):
    need_ports()
    (run,), (test,) = commands("Run it"), commands("Test it")
    clone, *install, lab = commands("In Jupyter")[0].splitlines()
    assert clone.startswith("git clone ADDRESS") and lab == "jupyter lab project.ipynb"
    before = {path.name for path in folder.iterdir()}
    shell("\n".join([*install, "jupyter lab --version"]), folder)
    shell(run, folder)
    page = (folder / "output" / "project.html").read_text(encoding="utf-8")
    assert f"Logging to {FIRST}" in page and "Version 2 is the champion" in page
    assert "tests/images" not in page, "the pictures are not embedded"
    (pip,) = folder.glob(".venv/lib/python*/site-packages/pip-*.dist-info/METADATA")
    pip.write_text(
        re.sub(r"(?m)^Version: .*", "Version: 99.9", pip.read_text(encoding="utf-8"))
    )
    shell(run, folder)
    shell("grep 'Version 4 is the champion' output/project.html", folder)
    assert "Version: 99.9" in shell(".venv/bin/python -m pip show pip", folder)
    (clean_up,) = re.findall(r".*\*\*To clean up\*\*.*", section("More troubles"))
    left = {path.name for path in folder.iterdir()} - before
    assert left == set(re.findall(r"`([\w.-]+)/?`", clean_up))
    shell(f"{test.strip()} -k project.ipynb", folder)


def test_the_run_command_with_uv_needs_nothing_but_uv(folder):
    need_ports()
    run, _ = commands("Windows and uv")[0].splitlines()
    shell(f"{run}; grep 'Version 2 is the champion' output/project.html", folder)


def test_mlflow_ui_serves_the_database_also_beside_an_old_mlruns_folder(tmp_path):
    (tmp_path / "mlruns" / "0").mkdir(parents=True)
    (tmp_path / "mlruns" / "0" / "meta.yaml").write_text(
        "experiment_id: '0'\nname: Default\n"
    )
    (tmp_path / ".venv" / "bin").mkdir(parents=True)
    (tmp_path / ".venv" / "bin" / "mlflow").symlink_to(SCRIPTS / "mlflow")
    (look,), port = (
        commands("Look at the runs"),
        re.search("--port", section("More troubles"))[0],
    )
    look = ["bash", "-ec", f"{look.strip()} {port} {port_of(address := loopback())}"]
    with helpers.running(look, address, tmp_path / "ui.log", cwd=tmp_path):
        assert (tmp_path / "mlflow.db").exists()


def test_the_champion_is_served_to_the_program_that_asks_for_it(client, tmp_path):
    (serve,), (ask,) = (
        commands("Serve the champion", kind) for kind in ("bash", "python")
    )
    address = loopback()
    serve = serve.replace(FIRST, client.tracking_uri).replace("5010", port_of(address))
    env = os.environ | {"PATH": f"{SCRIPTS}{os.pathsep}{os.environ['PATH']}"}
    with helpers.running(
        ["bash", "-c", serve], f"{address}/ping", tmp_path / "log", env=env
    ):
        program = [sys.executable, "-c", ask.replace("5010", port_of(address))]
        answer = subprocess.check_output(program, text=True).strip()
    assert f"# {answer}\n" in section("Serve the champion")


@pytest.fixture(scope="module")
def older(tmp_path_factory):
    """The folder of an MLflow 2.16.2, installed and served at port 5000 by README's commands."""
    need_ports()
    folder = tmp_path_factory.mktemp("older")
    install, serve = commands("MLflow 2.16.2")
    shell(install, folder)
    with helpers.running(
        ["bash", "-ec", serve], f"{FIRST}/health", folder / "log", cwd=folder
    ):
        yield folder


def test_an_mlflow_2_server_is_passed_by_and_at_a_given_address_refused(
    older, tmp_path
):
    with helpers.kernel(tmp_path / "free", None) as run:
        assert start(run) == f"Logging to {helpers.SECOND}\n"
    shown, _ = refused(tmp_path / "given", FIRST)
    assert "# 404: this server is older than MLflow 3" in shown
    assert "logged-models/search failed with error code 404" in shown
    assert experiments(FIRST) == ["Default"]


def test_after_readmes_edits_the_notebook_runs_on_mlflow_2_16_2(older):
    edited = helpers.notebook()
    edits = re.findall(
        r"^\| `(.+)` \| `(.+)` \|$", section("MLflow 2.16.2"), re.MULTILINE
    )
    assert len(edits) == 2
    for old, new in edits:
        (cell,) = [c for c in edited.cells if c.cell_type == "code" and old in c.source]
        cell.source = cell.source.replace(old, new)
    nbformat.write(edited, older / "project.ipynb")
    command = ".venv/bin/jupyter nbconvert --execute --to notebook --output done project.ipynb"
    shell(f"MLFLOW_TRACKING_URI={FIRST} {command}", older)
    done = nbformat.read(older / "done.ipynb", as_version=4)
    for cell in [
        "compare-runs",
        "reload-models",
        "find-mistakes",
        "validate",
        "list-versions",
    ]:
        assert helpers.output(done, cell) == helpers.output(helpers.notebook(), cell)
