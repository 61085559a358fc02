"""Measure the notebook beside MLflow's defaults; write the table and its date into README.

`.venv/bin/python tests/benchmark.py`, on Linux: medians of three rounds, the least and the greatest
in parentheses, in turns and after a warm-up, which leaves bytecode and uv's environment behind.
"""

import os
import platform
import re
import sys
import tempfile
import time
from datetime import date
from pathlib import Path
from statistics import median
from unittest.mock import patch

for name in [name for name in os.environ if name.startswith("MLFLOW_")]:
    del os.environ[name]  # both sides start from MLflow's defaults
os.environ["MLFLOW_DISABLE_TELEMETRY"] = "true"
os.environ["no_proxy"] = os.environ["NO_PROXY"] = "127.0.0.1,localhost"
os.environ.pop(
    "PYTHONDONTWRITEBYTECODE", None
)  # without bytecode, importing MLflow takes longer

import psutil
from helpers import LEAN, ROOT, kernel, loopback, mlflow_server, port_of, running
from maintain import README, with_table


def take_turns(*alternatives):
    """Call the functions in turn, each round beginning with another; return each one's results."""
    results, count = [[] for _ in alternatives], len(alternatives)
    for turn in range(4):
        for chosen in ((turn + i) % count for i in range(count)):
            results[chosen].append(alternatives[chosen]())
    return [result[1:] for result in results]  # without the warm-up


def row(what, default, ours, digits=1):
    """Return a row of the table; the ratio is that of the medians, where there are two."""
    columns = [
        f"{median(r):.{digits}f} ({min(r):.{digits}f}–{max(r):.{digits}f})"
        if r
        else "–"
        for r in (default, ours)
    ]
    columns.append(f"{median(default) / median(ours):.1f}" if default else "–")
    print(what, *columns, sep=" | ", flush=True)
    return [what, *columns]


def start(command, **env):
    """Start a server in an empty folder; return the seconds until /health answers, and its MB.

    The MB are of all its processes 30 s later, as PSS: a page that n share counts as 1/n in each.
    """
    address = loopback()
    command = [sys.executable, "-m", "mlflow", *command, "--port", port_of(address)]
    with tempfile.TemporaryDirectory() as folder:
        log, started = Path(folder) / "server.log", time.monotonic()
        with running(
            command, f"{address}/health", log, cwd=folder, env=os.environ | env
        ) as server:
            seconds = time.monotonic() - started
            time.sleep(30)  # job workers still start after the server is up
            processes = [psutil.Process(server.pid)]
            processes += processes[0].children(recursive=True)
            memory = sum(process.memory_full_info().pss for process in processes) / 1e6
        psutil.wait_procs(processes, timeout=30)
    return seconds, memory


def log_model():
    """Log one model on one server; return the seconds of log_model: inferred, explicit."""
    import mlflow  # not before: it would share its libraries' pages with the servers above
    from sklearn.datasets import load_iris
    from sklearn.linear_model import LogisticRegression

    X, y = load_iris(return_X_y=True, as_frame=True)
    model = LogisticRegression(max_iter=1000).fit(X, y.astype(str))

    def log(**requirements):
        with mlflow.start_run():
            started = time.monotonic()
            mlflow.sklearn.log_model(
                model, name="model", input_example=X.head(3), **requirements
            )
            return time.monotonic() - started

    with (
        tempfile.TemporaryDirectory() as folder,
        mlflow_server(Path(folder)) as address,
    ):
        mlflow.set_tracking_uri(address)
        return take_turns(
            log, lambda: log(pip_requirements=str(ROOT / "requirements.txt"))
        )


def page():
    """Execute the notebook with a server of its own; return the seconds of it and of two cells."""
    seconds = {}
    with tempfile.TemporaryDirectory() as folder:
        started = time.monotonic()
        with kernel(Path(folder), None) as cells:
            for cell in cells.notebook.cells:
                began = time.monotonic()
                cells(cell.id, cell.id)
                seconds[cell.id] = time.monotonic() - began
            whole = time.monotonic() - started
            server = psutil.Process(cells.pid).children(recursive=True)
        psutil.wait_procs(server, timeout=30)
    return whole, seconds["meet-warning"], seconds["validate"]


def measure():
    """Return the rows of README's table."""
    lean = {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
    servers = take_turns(lambda: start(["server"]), lambda: start(LEAN, **lean))
    (seconds, memory), (our_seconds, our_memory) = (
        zip(*results) for results in servers
    )
    yield row("The server until it is up, s", seconds, our_seconds)
    yield row("The server's memory, MB", memory, our_memory, digits=0)
    quiet = (
        "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT",
        "MLFLOW_REQUIREMENTS_INFERENCE_RAISE_ERRORS",
    )
    with patch.dict(
        os.environ, dict.fromkeys(quiet, "true")
    ):  # a guess that fails is no result
        logging = log_model()
    what = "Logging a model: requirements inferred, or from the file, s"
    yield row(what, *logging, digits=2)
    whole, guess, validation = zip(*take_turns(page)[0])
    yield row("The whole page with its server, s", None, whole)
    yield row("of it, the guess that fails, s", None, guess)
    yield row("of it, the validation, s", None, validation)


def write(rows):
    """Put the rows into README's table, and in the sentence above it when and where they are from."""
    text = README.read_text(encoding="utf-8")
    text = with_table(text, ["", "MLflow's default", "this notebook", "ratio"], rows)
    system = f"{platform.system()} with {os.cpu_count()} cores"
    today = f"on {date.today()}, {system} and Python {platform.python_version()}"
    sentence = r"on \d{4}-\d\d-\d\d, \w+ with \w+ cores and Python [\d.]+\d"
    text, count = re.subn(sentence, today, text)
    assert count == 1, f"README does not say once when and where: {today}"
    README.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    write(list(measure()))
