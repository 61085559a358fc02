"""Execute project.ipynb and save it: `python tests/save.py`; with `--pictures`, tests/images/ too.

It runs in an environment of requirements.txt alone, on an empty server at the address that the page
names. If anybody listens there it stops, for it would write into their records. Ids and times are
new in `git diff` each time. The pictures need chromium or google-chrome.
"""

import os
import shutil
import socket
import subprocess
import sys
from tempfile import TemporaryDirectory

from playwright.sync_api import sync_playwright
from suite import ROOT, running

FLAGS = ["--no-sandbox", "--disable-background-networking"]  # root has no sandbox
ADDRESS = "http://127.0.0.1:5001"
UV = [sys.executable, "-m", "uv", "run", "--quiet", "--isolated", "--no-project"]
UV += ["--python", sys.executable, "--with-requirements", f"{ROOT}/requirements.txt"]
UV += ["--with", "pip"]  # MLflow warns of an environment that has none
SERVER = [*UV, "mlflow", "server", "--port", "5001", "--workers", "1"]
SAVE = [*UV, "jupyter", "nbconvert", "--inplace", "--to", "notebook", "project.ipynb"]
EXECUTE = [*SAVE, "--execute", "--ExecutePreprocessor.record_timing=False"]
JOIN = [*SAVE, "--coalesce-streams"]  # which are cut at random places


def take_pictures():
    """Save MLflow's pages of the first run and of the champion, as wide as they are legible."""
    import mlflow  # reads the variables that suite has set

    client = mlflow.MlflowClient(ADDRESS)
    baseline = client.search_runs(["1"], "run_name = 'baseline'")[0].info.run_id
    pages = {
        "mlflow-run.png": (
            f"experiments/1/runs/{baseline}",
            "Registered prompts—",
            "prior",
        ),
        "mlflow-version.png": (
            "models/tracking_quick_start/versions/2",
            "Schema",
            "string",
        ),
    }
    program = shutil.which("chromium") or shutil.which("google-chrome")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=program, args=FLAGS)
        for name, (where, loaded, last) in pages.items():
            page = browser.new_page(viewport={"width": 1120, "height": 1400})
            hint = page.get_by_role("button", name="Got it")
            page.add_locator_handler(hint, lambda hint=hint: hint.click())
            page.goto(f"{ADDRESS}/#/{where}")
            page.get_by_role("button", name="Close", exact=True).click()  # an assistant
            page.get_by_role("button", name="Toggle sidebar").click()
            main = page.get_by_role("main")
            main.get_by_text(loaded).last.wait_for()
            for group in main.get_by_role("row", name="puts (").all():
                group.click()
            end = main.get_by_text(last).last.bounding_box()
            clip = main.bounding_box()
            clip["height"] = end["y"] + end["height"] + 24 - clip["y"]
            page.screenshot(path=ROOT / "tests" / "images" / name, clip=clip)


def main():
    """Start the server, execute and save, take the pictures if asked."""
    socket.create_server(("127.0.0.1", 5001)).close()  # raises where it is taken
    jobs = {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", "LOGNAME": "reader"}
    env = os.environ | jobs | {"IPYNB_FILE": "project.ipynb"}
    with TemporaryDirectory() as folder:
        log = ROOT / "mlflow-server.log"
        with running(SERVER, f"{ADDRESS}/health", log, cwd=folder, env=env):
            for command in (EXECUTE, JOIN):
                subprocess.run(command, cwd=ROOT, env=env, check=True)
            if "--pictures" in sys.argv:
                take_pictures()


if __name__ == "__main__":
    main()
