"""MLflow, JupyterLab and the rendered notebook in a browser; SAVE_PICTURES=1 makes the pictures."""

import os
import re
import sys

import helpers
import pytest
from maintain import frame
from nbconvert import HTMLExporter
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from playwright.sync_api import expect

(FIRST, PARAMS, _), (SECOND, _, TRAINING_INFO) = helpers.RUNS.values()
pytestmark = pytest.mark.slow


@pytest.fixture
def measured():
    """Accuracy and log loss of the better run and of the other, as MLflow's page shows them."""
    header, rows = frame(helpers.notebook(), "compare-runs")
    columns = [header.index(f"metrics.{name}") for name in ("accuracy", "log_loss")]
    return [
        [row[column][:4].rstrip("0").rstrip(".") for column in columns] for row in rows
    ]


@pytest.fixture
def page():
    with helpers.browser() as browser:
        page = browser.new_page(viewport={"width": 1208, "height": 1200})
        hint = page.get_by_role(
            "button", name="Got it"
        )  # MLflow's hints pop up at any time
        page.add_locator_handler(hint, lambda: hint.click())
        yield page


@pytest.fixture(scope="module")
def links(tmp_path_factory):
    """What MLflow printed: the links to the runs, by their names, and to the experiment."""
    folder = tmp_path_factory.mktemp("server")
    with helpers.mlflow_server(folder) as address:
        notebook = helpers.execute(folder / "notebook", address, LOGNAME="reader")
        text = helpers.output(notebook, "run-lbfgs") + helpers.output(
            notebook, "run-newton-cg"
        )
        yield dict(re.findall(r"View (?:run )?(.+) at: (\S+)", text)) | {
            "home": address
        }


def open_page(page, url):
    """Open a page of MLflow in the whole width of the window; return its main part."""
    page.goto(url.split("#")[0])
    page.get_by_role(
        "button", name="Close", exact=True
    ).click()  # the assistant, unasked
    page.get_by_role("button", name="Toggle sidebar").click()
    main = page.get_by_role("main")
    expect(main).to_have_css("width", f"{page.viewport_size['width'] - 56}px")
    page.goto(url)
    return main


def see(part, *texts):
    """Wait until the part of the page shows these texts, in this order."""
    spaced = [
        re.escape(text).replace(r"\ ", r"\s+").replace(":", r"\s*:") for text in texts
    ]
    expect(part).to_contain_text(
        re.compile(".*".join(spaced), re.DOTALL), use_inner_text=True
    )


def see_images(part, name, count, width):
    """Wait until so many images of this name are visible, each with more pixels than `width`."""
    images = part.locator(f"img[alt*='{name}']")
    expect(images).to_have_count(count)
    for image in images.all():
        expect(image).to_be_visible()
        assert (
            image.evaluate("image => image.decode().then(() => image.naturalWidth)")
            > width
        )


def save_picture(main, name, last):
    """If pictures are wanted, save the page's main part as far as a little below `last`."""
    if os.environ.get("SAVE_PICTURES"):
        main.page.mouse.move(0, 0)
        clip, end = main.bounding_box(), last.bounding_box()
        clip["height"] = end["y"] + end["height"] + 16 - clip["y"]
        path = helpers.ROOT / "tests" / "images" / name
        main.page.screenshot(path=path, clip=clip)
        (note := PngInfo()).add_text("Description", helpers.pictured())
        Image.open(path).save(path, pnginfo=note)  # a test sees by it when it is old


def test_the_printed_links_and_readmes_way_lead_to_the_runs_and_to_the_registry(
    page, links
):
    look, main = helpers.section("Look at the runs"), page.get_by_role("main")
    for name, title in [
        (FIRST,) * 2,
        (SECOND,) * 2,
        ("experiment", "Overview"),
    ]:
        page.goto(links[name])
        see(main, helpers.EXPERIMENT, title)
    page.goto(links["home"])
    way = [
        ("Model training", "Recent Experiments"),
        (helpers.EXPERIMENT, FIRST),
    ]
    for step, shown in [*way, ("Model registry", "Registered Models")]:
        assert f"*{step}*" in look
        page.get_by_text(step, exact=True).first.click()
        see(main, shown)


def test_the_list_of_runs_shows_accuracy_and_log_loss_once_columns_are_chosen(
    page, links, measured
):
    page.set_viewport_size({"width": 1600, "height": 1200})  # the new columns come last
    main = open_page(page, f"{links['experiment']}/runs")
    see(main, SECOND, FIRST)  # what can be chosen depends on them
    main.get_by_role("button", name="Columns", exact=True).click()
    for column in ["accuracy", "log_loss"]:
        page.get_by_role("dialog").get_by_text(column, exact=True).click()
    page.keyboard.press("Escape")
    see(
        main,
        "accuracy log_loss",
        SECOND,
        FIRST,
        *measured[0],
        *measured[1],
    )


def test_the_page_of_a_run_shows_what_was_logged_and_the_figure_as_an_image(
    page, links, measured
):
    main = open_page(page, links[FIRST])
    see(
        main,
        FIRST,
        f"Metrics ({len(helpers.METRICS)})",
        f"accuracy {measured[1][0]}",
        f"log_loss {measured[1][1]}",
        "Parameters (4)",
    )
    see(
        main,
        *(f"{name} {value}" for name, value in PARAMS.items()),
        "Status Finished",
    )
    see(
        main,
        "Datasets iris-train (d0862a25)",
        "Tags training info: Logistic regression w",
    )
    see(main, "task: classification", f"Registered models {helpers.NAME} v1")
    save_picture(main, "mlflow-run.png", main.locator(":has(> [role=table])").last)
    page.get_by_role("tab", name="Artifacts").click()
    main.get_by_text("confusion_matrix.png").click()
    see_images(main, "confusion_matrix.png", count=1, width=400)


def test_the_registered_model_shows_its_versions_and_the_champion_its_signature(
    page, links
):
    main = open_page(page, f"{links['home']}/#/models/{helpers.NAME}")
    see(
        main,
        helpers.NAME,
        "Description",
        "Species of an Iris flower from four measurements",
    )
    see(
        main,
        "Version 2",
        "validation: passed",
        "@ champion",
        "Logistic regression with",
    )
    main.get_by_role("link", name="Version 2").click()
    for group in ["Inputs (4)", "Outputs (1)"]:
        main.get_by_role("row", name=group).click()
    see(
        main,
        "Version 2",
        f"Source Run: {SECOND}",
        "Source Model: model",
        "@ champion",
    )
    see(
        main,
        TRAINING_INFO,
        "validation passed",
    )
    names = ["sepal length", "sepal width", "petal length", "petal width"]
    inputs = [f"{name} (cm) (required) double" for name in names]
    see(main, "Inputs (4)", *inputs, "Outputs (1)", "- (required) string")
    save_picture(
        main, "mlflow-version.png", main.get_by_role("row", name="- (required) string")
    )


def test_in_jupyterlab_run_all_finishes_and_does_so_again_after_a_restart(page, folder):
    last = max(cell.get("execution_count", 0) for cell in helpers.notebook().cells)
    lab, log = helpers.loopback(), folder / "lab.log"
    options = "--allow-root --no-browser --IdentityProvider.token=local --port"
    command = [
        sys.executable,
        "-m",
        "jupyterlab",
        *options.split(),
        helpers.port_of(lab),
    ]
    env = os.environ | {"JUPYTER_CONFIG_DIR": f"{folder}/config"}
    with helpers.running(command, f"{lab}/api", log, cwd=folder, env=env):
        page.goto(f"{lab}/lab/tree/project.ipynb?token=local")
        main = page.get_by_role("main")
        see_images(main, "MLflow", count=2, width=1000)
        for item, version in [
            ("Run All Cells", 2),
            ("Restart Kernel and Run All Cells…", 4),
        ]:
            page.get_by_role("menuitem", name="Run", exact=True).click()
            page.get_by_role("menuitem", name=item, exact=True).click()
            if "Restart" in item:
                page.get_by_role("button", name="Confirm Kernel Restart").click()
            expect(main.get_by_text("[*]:").first).to_be_visible()
            expect(main.get_by_text("[*]:")).to_have_count(0, timeout=180_000)
            for text in [
                f"[{last}]:",
                "Logging to http://127.0.0.1:",
                f"after:  {{'champion': '{version}'}}",
            ]:
                expect(main.get_by_text(text)).to_be_visible()


@pytest.mark.parametrize(
    "template", ["lab", "classic"]
)  # nbviewer shows the classic one
@pytest.mark.parametrize("width", [390, 1280], ids=["phone", "desktop"])
def test_the_rendered_notebook_carries_its_pictures_and_fits_the_screen(
    page, template, width
):
    exporter = HTMLExporter(template_name=template, embed_images=True)
    page.set_viewport_size({"width": width, "height": 800})
    page.set_content(
        exporter.from_filename(helpers.ROOT / "project.ipynb")[0]
    )  # in no folder
    see_images(page, "MLflow", count=2, width=1000)
    assert page.evaluate("document.documentElement.scrollWidth") <= width
