"""Measure the notebook beside MLflow's defaults; print the table that README shows.

From the project's folder, on Linux: `.venv/bin/python tests/benchmark.py`. Each figure is the
median of three rounds, with the least and the greatest in parentheses. The alternatives take turns,
after a warm-up round, which leaves Python's bytecode and uv's environment behind for both sides.
"""

import os
import platform
import sys
import tempfile
import time
from collections import deque
from datetime import datetime
from pathlib import Path
from statistics import median
from unittest.mock import patch

for name in [name for name in os.environ if name.startswith("MLFLOW_")]:
    del os.environ[name]  # both sides start from MLflow's defaults
os.environ["MLFLOW_DISABLE_TELEMETRY"] = "true"
os.environ["no_proxy"] = os.environ["NO_PROXY"] = "127.0.0.1,localhost"
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)  # without bytecode, importing MLflow takes longer

import psutil
from helpers import LEAN, ROOT, cell, kernel, loopback, mlflow_server, running

ROUNDS = 3


def take_turns(*alternatives):
    """Call the functions in turn, each round beginning with another; return each one's results."""
    results = [[] for _ in alternatives]
    for turn in range(ROUNDS + 1):
        for i in range(len(alternatives)):
            chosen = (turn + i) % len(alternatives)
            results[chosen].append(alternatives[chosen]())
    return [result[1:] for result in results]  # without the warm-up


def row(what, default, ours, digits=1):
    """Print a row of the table; the ratio is that of the medians, where there are two."""
    columns = [
        f"{median(r):.{digits}f} ({min(r):.{digits}f}–{max(r):.{digits}f})" if r else "–"
        for r in (default, ours)
    ]
    columns.append(f"{median(default) / median(ours):.1f}" if default else "–")
    print(f"| {what} | {' | '.join(columns)} |", flush=True)


def settle(pid):
    """Wait for a server to settle; return its processes and the MB (PSS) that they occupy.

    PSS counts a page that n processes share as 1/n in each. The server has settled when over 5 s
    its processes were as many, and their memory within 1 %: it still grows when all have started.
    """
    seen = deque(maxlen=6)
    for _ in range(180):
        processes = [psutil.Process(pid), *psutil.Process(pid).children(recursive=True)]
        seen.append((len(processes), sum(p.memory_full_info().pss for p in processes) / 1e6))
        counts, memory = zip(*seen)
        if len(seen) == 6 and len(set(counts)) == 1 and max(memory) < 1.01 * min(memory):
            return processes, memory[-1]
        time.sleep(1)
    raise TimeoutError(f"The server has not settled: {seen}")


def start(command, **env):
    """Start a server in an empty folder; return the seconds until /health answers, and its MB."""
    address = loopback()
    command = [sys.executable, "-m", "mlflow", *command, "--port", address.split(":")[-1]]
    with tempfile.TemporaryDirectory() as folder:
        log, started = Path(folder) / "server.log", time.monotonic()
        with running(command, f"{address}/health", log, cwd=folder, env=os.environ | env) as server:
            seconds = time.monotonic() - started
            processes, memory = settle(server.pid)
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
            mlflow.sklearn.log_model(model, name="model", input_example=X.head(3), **requirements)
            return time.monotonic() - started

    with tempfile.TemporaryDirectory() as folder, mlflow_server(Path(folder)) as address:
        mlflow.set_tracking_uri(address)
        return take_turns(log, lambda: log(pip_requirements=str(ROOT / "requirements.txt")))


def page():
    """Execute the notebook with a server of its own; return the seconds of it and of two cells.

    It: from the kernel's start to the last cell's end. A cell: while the kernel was busy with it.
    """
    with tempfile.TemporaryDirectory() as folder:
        started = time.monotonic()
        with kernel(Path(folder), loopback()) as run:
            notebook = run()
            seconds = [time.monotonic() - started]
            processes = psutil.Process(run.pid).children(recursive=True)
        psutil.wait_procs(processes, timeout=30)  # the server is one of them
    for noted in [cell(notebook, id).metadata.execution for id in ("meet-warning", "validate")]:
        busy, idle = (datetime.fromisoformat(noted[f"iopub.status.{s}"]) for s in ("busy", "idle"))
        seconds.append((idle - busy).total_seconds())
    return seconds


if __name__ == "__main__":
    cores, python = os.cpu_count(), platform.python_version()
    print(f"{datetime.now():%Y-%m-%d}, {platform.platform()}, {cores} cores, Python {python}\n")
    print("| | MLflow's default | this notebook | ratio |\n| --- | --- | --- | --- |", flush=True)
    lean = {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
    servers = take_turns(lambda: start(["server"]), lambda: start(LEAN, **lean))
    (seconds, memory), (our_seconds, our_memory) = (zip(*results) for results in servers)
    row("The server until it is up, s", seconds, our_seconds)
    row("The server's memory, MB", memory, our_memory, digits=0)
    quiet = "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "MLFLOW_REQUIREMENTS_INFERENCE_RAISE_ERRORS"
    with patch.dict(os.environ, dict.fromkeys(quiet, "true")):  # a guess that fails is no result
        row("Logging a model: requirements inferred, or from the file, s", *log_model(), digits=2)
    whole, guess, validation = zip(*take_turns(page)[0])
    row("The whole page with its server, s", None, whole)
    row("of it, the guess that fails, s", None, guess)
    row("of it, the validation, s", None, validation)
