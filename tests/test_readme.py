"""README's commands, run as they stand there, and the errors that it quotes."""

import html
import os
import re
import shutil
import signal
import ssl
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import helpers
import mlflow
import nbformat
import psutil
import pytest
from helpers import (
    SCRIPTS,
    cell,
    commands,
    kernel,
    loopback,
    mlflow_server,
    output,
    port_of,
    quoted,
    refusal,
    section,
    shell,
)

pytestmark = pytest.mark.slow
ADDRESS = "http://127.0.0.1:5000"  # the one that README shows


def with_address(command, address):
    """Return a command of README's with this address in the place of its own."""
    assert ADDRESS in command
    return command.replace(ADDRESS, address)


def test_its_commands_work_in_their_order_and_also_beside_a_pip_that_no_index_has(
    folder,
):
    (execute,), (lab,), (test,) = map(commands, ["Run it", "In Jupyter", "Test it"])
    before = {path.name for path in folder.iterdir()}
    shell(execute, folder)
    page = (folder / "output" / "project.html").read_text(encoding="utf-8")
    assert "after:  {'champion': '2'}" in html.unescape(page)
    assert "tests/images" not in page, "the pictures are not embedded"
    left = {path.name for path in folder.iterdir()} - before
    (clean_up,) = re.findall(r".*\*\*To clean up\*\*.*", section("More troubles"))
    assert left == set(re.findall(r"`([\w.-]+)/?`", clean_up))
    shell(re.sub(r"lab project\.ipynb$", "lab --version", lab.strip()), folder)
    (pip,) = folder.glob(".venv/lib/python*/site-packages/pip-*.dist-info/METADATA")
    version = re.sub(r"(?m)^Version: .*", "Version: 99.9", pip.read_text("utf-8"))
    pip.write_text(version, encoding="utf-8")
    shell(f"{test.strip()} -k ipynb", folder)
    assert "Version: 99.9" in shell(".venv/bin/python -m pip show pip", folder)


def test_the_run_command_with_uv_needs_nothing_but_uv(folder):
    run, _ = commands("Windows and uv")[0].splitlines()
    shell(f"{run}; grep -F 'after:' output/project.html", folder)


def test_a_named_server_gets_the_records_and_no_other_is_started(folder, tmp_path):
    (export,) = commands("Use your own server")
    before = {path.name for path in folder.iterdir()}
    with mlflow_server(tmp_path) as address:
        execute = f"'{SCRIPTS}/jupyter' nbconvert --execute --to html project.ipynb"
        shell(with_address(export, address) + execute, folder)
        versions = mlflow.MlflowClient(address).search_model_versions()
    assert len(versions) == 2
    assert {path.name for path in folder.iterdir()} - before == {"project.html"}


def test_mlflow_ui_serves_the_database_also_beside_an_old_mlruns_folder(tmp_path):
    (tmp_path / "mlruns" / "0").mkdir(parents=True)
    (tmp_path / "mlruns" / "0" / "meta.yaml").write_text(
        "experiment_id: '0'\nname: Default\n"
    )
    (tmp_path / ".venv" / "bin").mkdir(parents=True)
    (tmp_path / ".venv" / "bin" / "mlflow").symlink_to(SCRIPTS / "mlflow")
    without = [SCRIPTS / "mlflow", "ui", "--port", port_of(loopback())]
    refused = subprocess.run(
        without,
        check=False,
        cwd=tmp_path,
        stderr=subprocess.PIPE,
        text=True,
        timeout=60,
    )
    assert "mlruns" in refused.stderr and refused.returncode
    assert not (tmp_path / "mlflow.db").exists()
    (look,) = commands("Look at the runs")
    port = re.search("--port", section("Look at the runs"))[0]
    address = loopback()
    look = ["bash", "-ec", f"{look.strip()} {port} {port_of(address)}"]
    with helpers.running(look, address, tmp_path / "ui.log", cwd=tmp_path):
        assert (tmp_path / "mlflow.db").exists()


def test_the_champion_is_served_to_the_program_that_asks_for_it(client, tmp_path):
    (serve,), (ask,) = (
        commands("Serve the champion", kind) for kind in ("bash", "python")
    )
    address = loopback()
    serve = with_address(serve, client.tracking_uri)
    serve = serve.replace("5010", port_of(address))
    env = os.environ | {"PATH": f"{SCRIPTS}{os.pathsep}{os.environ['PATH']}"}
    with helpers.running(
        ["bash", "-c", serve], f"{address}/ping", tmp_path / "log", env=env
    ):
        program = [sys.executable, "-c", ask.replace("5010", port_of(address))]
        answer = subprocess.check_output(program, text=True).strip()
    assert f"# {answer}\n" in section("Serve the champion")


def test_a_kernel_without_the_packages_gives_the_error_that_readme_quotes(folder):
    shell(
        f"uv venv -q -p '{sys.executable}' bare && uv pip install -q -p bare ipykernel && "
        "bare/bin/python -m ipykernel install --prefix bare --name bare",
        folder,
    )
    command = f"JUPYTER_PATH=bare/share/jupyter '{SCRIPTS}/jupyter' nbconvert --execute"
    command += " --ExecutePreprocessor.kernel_name=bare --to html project.ipynb"
    shown = re.sub(r"\x1b\[[\d;]*m", "", shell(f"{command} 2>&1 || true", folder))
    assert re.search(f"{quoted('No module')[0]}'(matplotlib|mlflow)'", shown)


def test_an_index_behind_an_unknown_authority_gives_uvs_words_that_readme_quotes(
    tmp_path,
):
    helpers.need(shutil.which("openssl"), "no openssl here")
    shell(
        "openssl req -x509 -newkey rsa:2048 -nodes -days 1 -subj /CN=index "
        "-addext subjectAltName=IP:127.0.0.1 -addext basicConstraints=CA:FALSE "
        "-out index.crt -keyout index.key 2>log",
        tmp_path,
    )
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(tmp_path / "index.crt", tmp_path / "index.key")
    with HTTPServer(("127.0.0.1", 0), BaseHTTPRequestHandler) as index:
        index.socket = context.wrap_socket(index.socket, server_side=True)
        threading.Thread(target=index.serve_forever, daemon=True).start()
        env = os.environ | {"UV_CACHE_DIR": "cache", "UV_HTTP_RETRIES": "0"}
        env["UV_DEFAULT_INDEX"] = f"https://127.0.0.1:{index.server_port}/simple"
        asked = "uv run --isolated --no-project --with packaging true 2>&1 || true"
        shown = shell(asked, tmp_path, env)
        index.shutdown()
    words = re.search(r"uv says `(\w+)`", section("When something goes wrong"))[1]
    assert words in shown and quoted("fetch")[0] in shown


def test_an_address_without_http_gives_the_error_that_readme_quotes(tmp_path):
    with kernel(tmp_path, "127.0.0.1:5000") as cells:
        cells("start-server", "import-libraries")
        shown = refusal(cells, "connect")
    assert all(words in shown for words in quoted("maintenance mode"))


def test_an_address_where_nobody_answers_gives_the_error_that_readme_quotes(tmp_path):
    with kernel(tmp_path, address := loopback()) as cells:
        cells("start-server", "import-libraries")
        shown = refusal(cells, "connect")
    assert quoted("Max retries")[0] in shown and quoted("refused")[0] in shown
    assert address in shown


def test_a_deleted_experiment_is_named_and_readmes_command_restores_it(tmp_path):
    (restore,) = commands("When something goes wrong")
    listing = re.search(r"`\S+/(mlflow experiments search .+?)`", section("When some"))
    with kernel(tmp_path, None) as cells:
        cells("start-server", "connect")
        address = output(cells.notebook, "connect").split()[-1]
        mlflow.MlflowClient(address).delete_experiment("1")
        assert quoted("deleted experiment")[0] in refusal(cells, "connect")
        env = os.environ | {"MLFLOW_TRACKING_URI": address}
        deleted = shell(listing[1], tmp_path, env)
        assert re.search(rf"(?m)^1 +{helpers.EXPERIMENT}", deleted)
        shell(restore.replace(".venv/bin/mlflow", f"'{SCRIPTS}/mlflow'"), tmp_path)
        cells("connect", "connect")


def test_refused_models_give_the_error_that_readme_quotes(client, tmp_path):
    (words,) = quoted("Deserializing")
    setting = re.search(r"`(MLFLOW_ALLOW\w+)=(\w+)`", section("More troubles"))
    with kernel(tmp_path, client.tracking_uri, **{setting[1]: setting[2]}) as cells:
        cells("start-server", "compare-runs")
        assert words in refusal(cells, "reload-models")


def test_a_killed_kernels_server_is_found_and_ended_as_readme_says(tmp_path):
    (find,) = commands("More troubles")
    with kernel(tmp_path, None) as cells:
        cells("start-server", "connect")
        address = output(cells.notebook, "connect").split()[-1]
        os.kill(cells.pid, signal.SIGKILL)
        psutil.wait_procs([psutil.Process(cells.pid)], timeout=10)
        found = shell(find, tmp_path).splitlines()
        (line,) = [line for line in found if f"--port {port_of(address)} " in line]
        server = psutil.Process(int(line.split()[0]))
        processes = [server, *server.children(recursive=True)]
        server.terminate()
        assert psutil.wait_procs(processes, timeout=10)[1] == []


def test_mlflows_own_call_fails_where_the_page_says_it_does(folder, client):
    """When this is red, MLflow has mended it, and the sentence about it on the page can go."""
    shell(
        "uv venv -q --seed .venv && uv pip install -q -p .venv -r requirements.txt",
        folder,
    )
    program = (
        "import mlflow, pandas as pd; from sklearn.datasets import load_iris; "
        "mlflow.models.predict('models:/NAME/1', "
        "load_iris(as_frame=True).data, env_manager='uv')"
    )
    program = program.replace("NAME", helpers.NAME)
    command = f'MLFLOW_TRACKING_URI={client.tracking_uri} PATH="$PWD/.venv/bin:$PATH" '
    command += f'.venv/bin/python -c "{program}" 2>&1 || true'
    assert "can't open file" in shell(command, folder)


@pytest.fixture(scope="module")
def older(tmp_path_factory):
    """The folder and address of an MLflow 2.16.2, installed and served by README's commands."""
    folder, address = tmp_path_factory.mktemp("older"), loopback()
    install, serve = commands("MLflow 2.16.2")
    shell(install, folder)
    serve = f"{serve.strip()} --port {port_of(address)}"
    with helpers.running(
        ["bash", "-ec", serve], f"{address}/health", folder / "log", cwd=folder
    ):
        yield folder, address


def test_an_mlflow_2_server_gives_the_error_that_readme_quotes(older, tmp_path):
    with kernel(tmp_path, older[1]) as cells:
        cells("start-server", "first-intro")
        assert quoted("logged-models")[0] in refusal(cells, "run-lbfgs")


def test_after_readmes_edits_the_notebook_runs_on_mlflow_2_16_2(older):
    folder, address = older
    edited = helpers.notebook()
    edits = re.findall(
        r"^\| `(.+)` \| `(.+)` \|$", section("MLflow 2.16.2"), re.MULTILINE
    )
    assert len(edits) == 2
    for old, new in edits:
        source = cell(edited, "define-training").source
        assert source.count(old) == 1
        cell(edited, "define-training").source = source.replace(old, new)
    nbformat.write(edited, folder / "project.ipynb")
    command = ".venv/bin/jupyter nbconvert --execute --to notebook --output done project.ipynb"
    shell(f"MLFLOW_TRACKING_URI={address} {command}", folder)
    done = nbformat.read(folder / "done.ipynb", as_version=4)
    same = ["compare-runs", "reload-models", "find-mistakes", "validate", "promote"]
    for name in [*same, "list-versions"]:
        assert output(done, name) == output(helpers.notebook(), name)
