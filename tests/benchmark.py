"""Measure the tutorial beside what a reader would do otherwise; print the table that README shows.

From the project's folder: `.venv/bin/python tests/benchmark.py`. It takes about 40 minutes. Every
number is the median of the rounds, in which the alternatives take turns after a warm-up round.
"""

import os
import platform
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack
from datetime import datetime
from pathlib import Path
from statistics import median

import mlflow
import nbformat
import psutil
from conftest import LEAN_SERVER, ROOT, free_port, kernel, running
from nbclient import NotebookClient
from sklearn.datasets import load_iris
from sklearn.linear_model import LogisticRegression

ROUNDS = 3
LEAN = os.environ | {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}

# The steps of https://mlflow.org/docs/latest/ml/tracking/quickstart/, in words of our own.
QUICKSTART = {
    "imports": """
import mlflow
import pandas as pd
from mlflow.models import infer_signature
from sklearn import datasets
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import accuracy_score
from sklearn.model_selection import train_test_split
""",
    "logging": """
X, y = datasets.load_iris(return_X_y=True)
X_train, X_test, y_train, y_test = train_test_split(X, y, test_size=0.2, random_state=42)
params = {"solver": "lbfgs", "max_iter": 1000, "random_state": 8888}
model = LogisticRegression(**params).fit(X_train, y_train)
mlflow.set_experiment("quickstart")
with mlflow.start_run():
    mlflow.log_params(params)
    mlflow.log_metric("accuracy", accuracy_score(y_test, model.predict(X_test)))
    mlflow.set_tag("Training Info", "Basic LR model for iris data")
    info = mlflow.sklearn.log_model(
        model,
        name="iris_model",
        signature=infer_signature(X_train, model.predict(X_train)),
        input_example=X_train,
        registered_model_name="tracking-quickstart",
    )
""",
    "rest": """
loaded = mlflow.pyfunc.load_model(info.model_uri)
result = pd.DataFrame(X_test, columns=datasets.load_iris().feature_names)
result["actual_class"] = y_test
result["predicted_class"] = loaded.predict(X_test)
result[:4]
""",
}
# What of our notebook belongs under which heading; the rest of its cells is "rest".
OUR_CELLS = {
    "imports": ["settings", "import-libraries"],
    "server": ["ask-server", "find-server", "start-server", "wait-for-server"],
    "logging": ["run-lbfgs", "run-newton-cg"],
    "the failing guess": ["meet-warning"],
    "uv": ["validate-champion"],
}


def take_turns(*alternatives, warm_up=True):
    """Call the functions in turn, each round beginning with another; return the results of each.

    Those of the warm-up round are left out.
    """
    results = [[] for _ in alternatives]
    for turn in range(ROUNDS + warm_up):
        for i in range(len(alternatives)):
            chosen = (turn + i) % len(alternatives)
            results[chosen].append(alternatives[chosen]())
    return [result[warm_up:] for result in results]


def head(title, *alternatives):
    print(f"\n**{title}**\n\n| | {' | '.join(alternatives)} | ratio |")
    print("| --- |" + " --- |" * (len(alternatives) + 1))


def row(what, *results, unit="s"):
    """Print a row of a table: the median of each alternative, and that of the first to the last."""
    medians = [median(result) for result in results]
    shown = " | ".join(f"{value:.1f} {unit}" if value else "–" for value in medians)
    ratio = f"{medians[0] / medians[-1]:.1f}" if all(medians) else ""
    print(f"| {what} | {shown} | {ratio} |", flush=True)


def seconds_of(cell):
    """Return how long the kernel was busy with a cell, as nbclient noted it."""
    times = [cell.metadata.execution[f"iopub.status.{state}"] for state in ("busy", "idle")]
    start, end = (datetime.fromisoformat(time) for time in times)
    return (end - start).total_seconds()


def server(folder, command, env, address):
    options = [sys.executable, "-m", "mlflow", *command, "--port", address.split(":")[-1]]
    return running(options, f"{address}/health", folder / "server.log", cwd=folder, env=env)


def loopback():
    return f"http://127.0.0.1:{free_port()}"


# 1. The whole tutorial


def quickstart():
    """Do MLflow's quickstart from nothing; return the seconds of each part and of the whole."""
    address = loopback()
    cells = [nbformat.v4.new_code_cell(source) for source in QUICKSTART.values()]
    notebook = nbformat.v4.new_notebook(cells=cells)
    with tempfile.TemporaryDirectory() as folder:
        started = time.monotonic()
        with server(Path(folder), ["server"], os.environ, address):
            seconds = {"server": time.monotonic() - started}
            client = NotebookClient(notebook, resources={"metadata": {"path": folder}})
            client.execute(env=os.environ | {"MLFLOW_TRACKING_URI": address})
            seconds["all"] = time.monotonic() - started
    return seconds | {part: seconds_of(cell) for part, cell in zip(QUICKSTART, cells)}


def tutorial(address=None):
    """Execute project.ipynb, with a server of its own unless an address is given."""
    with tempfile.TemporaryDirectory() as folder:
        started = time.monotonic()
        with kernel(Path(folder), MLFLOW_TRACKING_URI=address or loopback()) as run:
            notebook = run()
            seconds = {"all": time.monotonic() - started}
    cells = {cell.id: seconds_of(cell) for cell in notebook.cells if cell.cell_type == "code"}
    for part, ids in OUR_CELLS.items():
        seconds[part] = sum(cells.pop(id) for id in ids)
    return seconds | {"rest": sum(cells.values())}


def whole():
    head("The whole tutorial, with the start of its server", "MLflow's quickstart", "this notebook")
    theirs, ours = take_turns(quickstart, tutorial)
    for part in ["all", "server", "imports", "logging", "the failing guess", "uv", "rest"]:
        row(part, *([result.get(part, 0) for result in results] for results in (theirs, ours)))


# 2. Logging a model


def logging():
    head("Logging one model, with requirements", "inferred", "from requirements.txt")
    iris = load_iris(as_frame=True)
    X, y = iris.data, iris.target_names[iris.target]
    model = LogisticRegression(max_iter=1000).fit(X, y)

    def log(**requirements):
        started = time.monotonic()
        with mlflow.start_run():
            mlflow.sklearn.log_model(model, name="model", input_example=X.head(3), **requirements)
        return time.monotonic() - started

    address = loopback()
    with tempfile.TemporaryDirectory() as folder, server(Path(folder), LEAN_SERVER, LEAN, address):
        mlflow.set_tracking_uri(address)
        inferred, explicit = take_turns(
            log, lambda: log(pip_requirements=str(ROOT / "requirements.txt"))
        )
    row("seconds", inferred, explicit)


# 3. The local server


def start(command, env):
    """Start a server; return the seconds until it is up, its processes and their resident MB."""
    address, started = loopback(), time.monotonic()
    with (
        tempfile.TemporaryDirectory() as folder,
        server(Path(folder), command, env, address) as process,
    ):
        seconds = time.monotonic() - started
        time.sleep(15)  # what the default server starts beside its workers is still coming up
        parent = psutil.Process(process.pid)
        processes = [parent, *parent.children(recursive=True)]
        resident = sum(process.memory_info().rss for process in processes)
    return seconds, len(processes), resident / 1e6


def local_server():
    head("The local server", "`mlflow server`", "as in the notebook")
    default, lean = take_turns(
        lambda: start(["server"], os.environ), lambda: start(LEAN_SERVER, LEAN)
    )
    for i, (what, unit) in enumerate(
        {"until it is up": "s", "processes": "", "resident memory, 15 s later": "MB"}.items()
    ):
        row(what, *([result[i] for result in results] for results in (default, lean)), unit=unit)


# 4. Growth


def fill(folder, executions):
    """Put runs and versions of as many executions into the store, without a server or files."""
    client = mlflow.MlflowClient(store := f"sqlite:///{folder / 'mlflow.db'}", store)
    # As a server would create it: otherwise its artifacts would not go through the server.
    experiment = client.create_experiment("mlflow quickstart", "mlflow-artifacts:/1")
    client.create_registered_model("tracking_quick_start")
    for _ in range(2 * executions):
        run = client.create_run(experiment, run_name="earlier")
        for key in ["solver", "C", "max_iter", "random_state"]:
            client.log_param(run.info.run_id, key, "1")
        for key in ["accuracy", "log_loss"]:
            client.log_metric(run.info.run_id, key, 0.5)
        client.set_terminated(run.info.run_id)
        client.create_model_version("tracking_quick_start", run.info.artifact_uri, run.info.run_id)


def growth():
    head("The notebook on a server that runs, after earlier executions", "1,000", "100", "none")
    with ExitStack() as stack:
        addresses = []
        for executions in [1000, 100, 0]:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
            fill(folder, executions)
            addresses.append(loopback())
            stack.enter_context(server(folder, LEAN_SERVER, LEAN, addresses[-1]))
        results = take_turns(*(lambda a=address: tutorial(a)["all"] for address in addresses))
    row("seconds", *results)


# 5. Set-up


def install(*command):
    """Make an environment and install requirements.txt; return the seconds."""
    with tempfile.TemporaryDirectory() as folder:
        started = time.monotonic()
        if command[0] == "pip":
            subprocess.run([sys.executable, "-m", "venv", folder], check=True)
            command = [f"{folder}/bin/python", "-m", *command]
        else:
            uv = Path(sys.executable).with_name("uv")
            subprocess.run([uv, "venv", "-q", "--clear", folder], check=True)
            command = [uv, *command[1:], "--python", folder]
        subprocess.run([*command, "-r", ROOT / "requirements.txt"], check=True)
        return time.monotonic() - started


def set_up():
    head("Set-up into an empty environment", "pip", "uv")
    pip, uv = ["pip", "install", "-q"], ["uv", "pip", "install", "-q"]
    cold = take_turns(
        lambda: install(*pip, "--no-cache-dir"), lambda: install(*uv, "--no-cache"), warm_up=False
    )
    row("nothing downloaded yet", *cold)
    warm = take_turns(lambda: install(*pip), lambda: install(*uv))
    row("everything in the cache", *warm)


if __name__ == "__main__":
    os.environ["MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT"] = "true"
    print(f"{platform.platform()}, {os.cpu_count()} cores, Python {platform.python_version()}")
    for measure in [whole, logging, local_server, growth, set_up]:
        measure()
