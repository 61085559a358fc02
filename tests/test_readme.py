"""README's commands and the page's own, run as they stand there, and the errors README quotes. Slow."""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from contextlib import nullcontext

import mlflow
import psutil
import pytest
from nbclient.exceptions import CellExecutionError
from playwright.sync_api import expect, sync_playwright
from suite import (
    ROOT,
    SCRIPTS,
    answering,
    commands,
    execute,
    free_port,
    read_notebook,
    running,
)

pytestmark = pytest.mark.slow
ENV = os.environ | {"PATH": f"{SCRIPTS}{os.pathsep}{os.environ['PATH']}"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A clone of the project in a folder whose name has spaces and letters beyond ASCII."""
    folder = tmp_path_factory.mktemp("readme") / "Mappe mit Wörtern 花"
    files = subprocess.check_output(["git", "ls-files", "-z"], cwd=ROOT, text=True)
    for name in files.strip("\0").split("\0"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, folder / name)
    return folder


def run_it(port):
    """Return README's block, with this port in the place of its own."""
    (block,) = commands("Run it")
    return block.replace("5001", str(port))


def left_behind(folder):
    """Return the command lines of the processes whose working directory is the folder."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.cwd() == str(folder):
                found.append(process.cmdline())
        except psutil.Error:
            pass
    return found


def test_the_block_runs_on_a_bare_machine_and_leaves_a_page_and_no_process(folder):
    before = {path.name for path in folder.iterdir()}
    told = os.environ | {"MLFLOW_TRACKING_URI": "http://mlflow.invalid"}
    done = subprocess.run(
        ["bash", "-c", run_it(free_port())], cwd=folder, env=told, check=False
    )
    assert (done.returncode, left_behind(folder)) == (0, [])
    page = (folder / "output" / "project.html").read_text(encoding="utf-8")
    assert "150 of 150 answers are equal" in page and "tests/images" not in page
    after = {path.name for path in folder.iterdir()} - before
    ignored = (ROOT / ".gitignore").read_text().split()
    assert after and {f"{n}/" if (folder / n).is_dir() else n for n in after} <= {
        *ignored
    }


def test_the_block_fails_with_a_failing_cell_and_leaves_no_process(folder):
    notebook = folder / "project.ipynb"
    saved = notebook.read_text(encoding="utf-8")
    notebook.write_text(saved.replace("baseline.score(", "baseline.wrong("), "utf-8")
    done = subprocess.run(["bash", "-c", run_it(free_port())], cwd=folder, check=False)
    notebook.write_text(saved, encoding="utf-8")
    assert (done.returncode, left_behind(folder)) == (1, [])


def test_the_block_ends_at_once_where_the_port_is_taken(folder, server):
    output = folder / "output" / "project.html"
    output.unlink(missing_ok=True)
    block = run_it(server.rsplit(":")[-1])
    done = subprocess.run(
        ["bash", "-c", block],
        cwd=folder,
        check=False,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert done.returncode == 1 and "Address already in use" in done.stderr
    assert not output.exists() and left_behind(folder) == []


def test_the_block_interrupted_leaves_no_process(folder):
    log = folder / "mlflow-server.log"
    log.unlink(missing_ok=True)
    shell = subprocess.Popen(
        ["bash", "-c", run_it(free_port())], cwd=folder, start_new_session=True
    )
    end = time.monotonic() + 120
    while not (log.exists() and "Uvicorn running" in log.read_text()):
        assert time.monotonic() < end and shell.poll() is None
        time.sleep(0.2)
    os.killpg(shell.pid, signal.SIGINT)  # as a terminal does
    assert shell.wait(timeout=60) != 0
    assert left_behind(folder) == []


def test_in_jupyterlab_run_all_cells_makes_a_champion(folder):
    (block,) = commands("In Jupyter")
    install, lab = block.splitlines()
    port, token = free_port(), "--IdentityProvider.token=local --allow-root"
    address = f"http://127.0.0.1:{free_port()}"
    step_1 = re.search(r"(?m)^mlflow server.*", read_notebook().cells[0].source)[0]
    serve = step_1.replace("5001", address.rsplit(":")[-1])
    activate = f"{install} && export MLFLOW_TRACKING_URI={address} && "
    command = f"{activate} exec {lab} --no-browser --port {port} {token}"
    serve = ["bash", "-c", f". .venv/bin/activate && exec {serve}"]
    program = shutil.which("chromium") or shutil.which("google-chrome")
    if not program:
        pytest.skip("neither chromium nor google-chrome on this machine")
    env = os.environ | {"JUPYTER_CONFIG_DIR": f"{folder}/config"}
    with (
        running(
            ["bash", "-c", command],
            f"http://127.0.0.1:{port}/api",
            folder / "lab.log",
            cwd=folder,
            env=env,
        ),
        running(serve, f"{address}/health", folder / "s.log", cwd=folder, env=env),
        sync_playwright() as playwright,
    ):
        browser = playwright.chromium.launch(
            executable_path=program, args=["--no-sandbox"]
        )
        page = browser.new_page()
        page.goto(f"http://127.0.0.1:{port}/lab/tree/project.ipynb?token=local")
        main = page.get_by_role("main")
        loaded = main.get_by_role("heading", name="1. Start a tracking server")
        expect(loaded).to_be_visible(timeout=60_000)
        page.get_by_role("menuitem", name="Run", exact=True).click()
        page.get_by_role("menuitem", name="Run All Cells", exact=True).click()
        expect(main.get_by_text("[*]:").first).to_be_visible(timeout=30_000)
        expect(main.get_by_text("[*]:")).to_have_count(0, timeout=180_000)
        browser.close()
        client = mlflow.MlflowClient(address)
        champion = client.get_model_version_by_alias("tracking_quick_start", "champion")
        run = client.get_run(champion.run_id)
    assert run.info.status == "FINISHED"


def test_the_champion_is_served_and_answers_as_the_page_says(client, tmp_path):
    (cell,) = [cell for cell in read_notebook().cells if cell.id == "serve"]
    serve, ask = re.findall(r"(?s)```bash\n(.*?)```", cell.source)
    port = str(free_port())
    serve = serve.replace("http://127.0.0.1:5001", client.tracking_uri)
    serve = serve.replace("5002", port).replace("mlflow models", "exec mlflow models")
    url = f"http://127.0.0.1:{port}/ping"
    with running(["bash", "-c", serve], url, tmp_path / "log", env=ENV):
        answer = subprocess.check_output(
            ["bash", "-c", ask.replace("5002", port)], text=True
        )
    assert f"`{answer.strip()}`" in cell.source


def test_the_downloaded_champion_answers_without_a_server(client, tmp_path):
    (program,) = commands("The champion", "python")
    program = program.replace("http://127.0.0.1:5001", client.tracking_uri)
    subprocess.run([sys.executable, "-c", program], cwd=tmp_path, check=True)
    load = 'mlflow.pyfunc.load_model("champion")'
    assert f"`{load}`" in (ROOT / "README.md").read_text(encoding="utf-8")
    program = f"""if True:
        import mlflow, sklearn.datasets
        X = sklearn.datasets.load_iris(as_frame=True).data
        print(*{load}.predict(X.head(3)))"""
    env = ENV | {"MLFLOW_TRACKING_URI": "http://mlflow.invalid"}
    command = [sys.executable, "-c", program]
    answer = subprocess.check_output(command, cwd=tmp_path, env=env, text=True)
    assert answer.split() == ["setosa"] * 3


def quotes(words):
    """Say whether README quotes these words, in bold, where things go wrong."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    return re.search(rf"(?m)^- \*\*[^*\n]*`{words}`", text)


ADDRESSES = {
    "error code 403": 403,
    "error code 404": 404,
    "Connection refused": "http://127.0.0.1:9",
    "maintenance mode": "127.0.0.1:9",
    "unsupported URI": "localhost:9",
}


@pytest.mark.parametrize("words", ADDRESSES)
def test_a_wrong_address_gives_the_error_that_readme_quotes(words, tmp_path):
    where = ADDRESSES[words]
    program = answering(where) if isinstance(where, int) else nullcontext((where, []))
    with program as (address, _), pytest.raises(CellExecutionError) as stopped:
        execute(tmp_path, until="connect", MLFLOW_TRACKING_URI=address)
    assert words in str(stopped.value) and quotes(words)


def test_a_deleted_experiment_gives_the_error_and_comes_back_as_readme_says(
    client, tmp_path
):
    edit = {"connect": ("mlflow quickstart", "to be deleted")}
    deleted = client.create_experiment("to be deleted")
    client.delete_experiment(deleted)
    with pytest.raises(CellExecutionError) as stopped:
        execute(tmp_path, edit, until="connect")
    words = "Cannot set a deleted experiment"
    assert words in str(stopped.value) and quotes(words)
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    search, restore = re.findall(r"`(mlflow experiments .+?)`", text)
    env = ENV | {"MLFLOW_TRACKING_URI": client.tracking_uri}
    listed = subprocess.check_output(search.split(), env=env, text=True)
    assert re.search(rf"(?m)^{deleted} +to be deleted", listed)
    subprocess.run([*restore.split(), deleted], env=env, check=True)
    execute(tmp_path, edit, until="connect")


PIP = f"'{sys.executable}' -m pip install --quiet --target"
ERRORS = {
    "Address already in use": "mlflow server --workers 1 --port {port}",
    "Failed to fetch": "UV_CACHE_DIR=cache UV_HTTP_RETRIES=0 UV_DEFAULT_INDEX="
    "http://127.0.0.1:9/simple uv run --isolated --no-project --with skops true",
    "No matching distribution": f"{PIP} new --python-version 3.10 --only-binary :all: "
    "--dry-run --no-deps -r requirements.txt",
    "No module named": f"uv venv -q -p '{sys.executable}' bare && "
    "bare/bin/python -c 'import mlflow'",
}


@pytest.mark.parametrize("words", ERRORS)
def test_a_command_that_fails_says_what_readme_quotes(server, tmp_path, words):
    shutil.copy(ROOT / "requirements.txt", tmp_path)
    command = ERRORS[words].format(port=server.rsplit(":")[-1])
    done = subprocess.run(
        ["bash", "-c", f"{command} 2>&1"],
        cwd=tmp_path,
        env=ENV,
        check=False,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert words.lower() in done.stdout.lower() and quotes(words), done.stdout
