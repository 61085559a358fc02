"""What a reader sees: MLflow's web page, JupyterLab and the rendered notebook, in a real browser.

README's pictures are made here: `SAVE_PICTURES=1 .venv/bin/python -m pytest -m slow -k browser`.
"""

import os
import re
import shutil
import sys

import pytest
from conftest import ROOT, execute, free_port, mlflow_server, output, running
from nbconvert import HTMLExporter
from playwright.sync_api import expect, sync_playwright

PICTURES = ROOT / ".github" / "images"
BROWSERS = ["chromium", "chromium-browser", "google-chrome"]
FLAGS = [
    "--no-sandbox",  # CI runs as root
    "--disable-gpu",
    "--disable-background-networking",
    "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",  # this machine alone
]
SECONDS = 1000  # Playwright counts milliseconds
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def browser():
    program = next(filter(None, map(shutil.which, BROWSERS)), None)
    if not program:
        pytest.skip(f"no browser on this machine: none of {', '.join(BROWSERS)}")
    expect.set_options(timeout=30 * SECONDS)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=program, args=FLAGS)
        yield browser
        browser.close()


@pytest.fixture
def page(browser):
    with browser.new_page(viewport={"width": 1280, "height": 800}, device_scale_factor=2) as page:
        yield page


@pytest.fixture(scope="module")
def links(tmp_path_factory):
    """The links that the notebook prints in the end: what they lead to, and the address."""
    folder = tmp_path_factory.mktemp("server")
    with mlflow_server(folder) as address:
        notebook = execute(folder / "notebook", MLFLOW_TRACKING_URI=address)
        yield dict(re.findall(r"^(.+): (http.+)$", output(notebook, "print-links"), re.MULTILINE))


def open_link(page, url):
    page.goto(url)
    page.get_by_role("button", name="Close", exact=True).click()  # the assistant, unasked


def open_list_of_runs(page, links):
    open_link(page, links["Experiment"])
    # What the page offers to select and to show depends on the runs, which arrive after it.
    expect(page.get_by_role("link", name="lbfgs, C=1")).to_be_visible()


def save_picture(page, name, first, last):
    """If pictures are wanted, save the page from the element `first` to a little below `last`."""
    if os.environ.get("SAVE_PICTURES"):
        page.mouse.move(0, 0)
        top, bottom = first.bounding_box(), last.bounding_box()
        height = bottom["y"] + bottom["height"] + 16 - top["y"]
        clip = page.get_by_role("main").bounding_box() | {"y": top["y"], "height": height}
        page.screenshot(path=PICTURES / name, clip=clip)


def test_readmes_way_through_the_page_leads_to_the_runs_and_to_the_registry(page, links):
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    open_link(page, links["Experiment"].split("/#")[0])
    for step, shown in [
        ("Model training", "Recent Experiments"),
        ("mlflow quickstart", "lbfgs, C=1"),
        ("Model registry", "Registered Models"),
    ]:
        assert f"*{step}*" in readme
        page.get_by_text(step, exact=True).first.click()
        expect(page.get_by_text(shown, exact=True).first).to_be_visible()


def test_the_list_of_runs_shows_both_with_accuracy_and_log_loss(page, links):
    open_list_of_runs(page, links)
    page.get_by_role("button", name="Columns", exact=True).click()
    for column in ["accuracy", "log_loss", "Dataset", "Source", "Models"]:  # two on, three off
        page.get_by_role("dialog").get_by_text(column, exact=True).click()
    page.keyboard.press("Escape")
    expect(page.get_by_role("main")).to_match_aria_snapshot("""
        - link "mlflow quickstart"
        - grid:
          - rowgroup:
            - row "Metrics"
            - row "Duration accuracy log_loss"
          - rowgroup:
            - row:
              - gridcell:
                - link "newton-cg, C=10"
            - row:
              - gridcell:
                - link "lbfgs, C=1"
          - rowgroup:
            - row:
              - gridcell "1"
              - gridcell /0\\.0758/
            - row:
              - gridcell /0\\.9666/
              - gridcell /0\\.1589/
    """)
    save_picture(page, "mlflow-runs.png", page.get_by_role("grid"), page.get_by_text("lbfgs, C=1"))


def test_the_two_runs_can_be_compared(page, links):
    open_list_of_runs(page, links)
    page.get_by_role("checkbox", name="Select all runs").check()
    page.get_by_role("link", name="Compare").or_(
        page.get_by_role("button", name="Compare")
    ).first.click()
    main = page.get_by_role("main")
    expect(main.get_by_role("heading", name="Comparing 2 Runs")).to_be_visible()
    for row in ["C 10.0 1.0", "solver newton-cg lbfgs"]:
        expect(main.get_by_role("row", name=row)).to_be_visible()
    for value in ["0.967", "0.076", "0.159"]:
        expect(main.get_by_text(value, exact=True)).to_be_visible()


def test_the_page_of_a_run_shows_what_was_logged_and_the_figure_as_an_image(page, links):
    open_link(page, links["Run lbfgs, C=1"])
    main = page.get_by_role("main")
    for text in ["Finished", "iris-train (d0862a25)", "task: classification", "Parameters (4)"]:
        expect(main.get_by_text(text)).to_be_visible()
    for row in ["solver lbfgs", "C 1", "accuracy 0.966", "log_loss 0.158"]:
        expect(main.get_by_role("row", name=row)).to_be_visible()
    page.get_by_role("tab", name="Artifacts").click()
    main.get_by_text("confusion_matrix.png").click()
    image = main.get_by_role("img", name="confusion_matrix.png")
    expect(image).to_be_visible()
    assert image.evaluate("image => image.naturalWidth") > 400


def test_the_page_of_the_registered_model_shows_versions_descriptions_and_champion(page, links):
    open_link(page, links["Registered model"])
    main = page.get_by_role("main")
    expect(main).to_match_aria_snapshot("""
        - heading "tracking_quick_start"
        - paragraph: Species of an Iris flower from four measurements
        - table:
          - row:
            - cell "Version 2"
            - cell "validation":
              - status: "validation : passed"
            - cell "champion"
            - cell /Logistic regression on Iris/
          - row:
            - cell "Version 1"
            - cell "validation":
              - status: "validation : pending"
            - cell "Add"
            - cell /Logistic regression on Iris/
    """)
    rows = main.get_by_role("row")
    save_picture(page, "mlflow-registry.png", rows.first, rows.last)


def test_the_page_of_a_version_shows_its_signature(page, links):
    open_link(page, links["Registered model"])
    page.get_by_role("link", name="Version 2").click()
    main = page.get_by_role("main")
    for group, column in [
        ("Inputs (4)", "petal width (cm) (required) double"),
        ("Outputs (1)", "species (required) string"),
    ]:
        main.get_by_role("row", name=group).click()
        expect(main.get_by_role("row", name=column)).to_be_visible()


def test_in_jupyterlab_run_all_finishes_and_does_so_again_after_a_restart(page, tmp_path):
    for name in ["project.ipynb", "requirements.txt"]:
        shutil.copy(ROOT / name, tmp_path)
    address, server = (f"http://127.0.0.1:{free_port()}" for _ in range(2))
    port = address.split(":")[-1]
    lab = [sys.executable, "-m", "jupyterlab", "--allow-root", "--no-browser", f"--port={port}"]
    env = os.environ | {"MLFLOW_TRACKING_URI": server, "JUPYTER_TOKEN": "local"}
    with running(lab, f"{address}/api", tmp_path / "lab.log", cwd=tmp_path, env=env):
        page.goto(f"{address}/lab/tree/project.ipynb?token=local")
        notebook = page.get_by_role("main")
        expect(notebook.get_by_text("The champion is version 2.")).to_be_visible()  # the saved one

        page.get_by_role("menuitem", name="Run", exact=True).click()
        page.get_by_role("menuitem", name="Run All Cells", exact=True).click()
        expect(notebook.get_by_text(f"Waiting for the MLflow server at {server}")).to_be_visible()
        wait_until_all_cells_ran(notebook)
        expect(notebook.get_by_text(f"{server}/#/models/tracking_quick_start")).to_be_visible()
        expect(notebook.get_by_text("The champion is version 2.")).to_be_visible()

        page.get_by_role("menuitem", name="Kernel", exact=True).click()
        page.get_by_role("menuitem", name="Restart Kernel and Run All Cells").click()
        page.get_by_role("button", name="Confirm Kernel Restart").click()
        expect(notebook.get_by_text("[*]:").first).to_be_visible()
        wait_until_all_cells_ran(notebook)
        expect(notebook.get_by_text("The champion is version 4.")).to_be_visible()


def wait_until_all_cells_ran(notebook):
    """Wait until JupyterLab's notebook has no cell to run, and see that the last one has run."""
    expect(notebook.get_by_text("[*]:")).to_have_count(0, timeout=180 * SECONDS)
    expect(notebook.get_by_text("[28]:")).to_be_visible()


# The two forms of page that nbconvert makes; nbviewer shows the classic one.
@pytest.mark.parametrize("template", ["lab", "classic"])
@pytest.mark.parametrize("width", [390, 1280], ids=["phone", "desktop"])
def test_only_tables_and_code_scroll_sideways_in_the_rendered_notebook(
    page, tmp_path, template, width
):
    html, _ = HTMLExporter(template_name=template).from_filename(ROOT / "project.ipynb")
    path = tmp_path / "project.html"
    path.write_text(html, encoding="utf-8")
    page.set_viewport_size({"width": width, "height": 800})
    page.goto(path.as_uri(), wait_until="domcontentloaded")
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    for element in page.locator("p, li, h1, h2, img").all():
        box = element.bounding_box()
        assert box["x"] >= 0 and box["x"] + box["width"] <= width, element.inner_text()
