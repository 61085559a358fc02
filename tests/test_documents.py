"""The notebook file, README and the guides: well formed, and true to each other."""

import json
import re

import nbformat
import pytest
import yaml
from helpers import (
    EXPERIMENT,
    METRICS,
    NAME,
    ROOT,
    RUNS,
    command,
    notebook,
    output,
    pictured,
)
from maintain import LOCK, readme_with_its_tables
from PIL import Image

GUIDES = [*ROOT.glob("*.md"), *ROOT.glob(".github/*.md")]
TESTED = ["2.16.2"]  # releases of MLflow beside the pinned one that a test runs


@pytest.fixture
def code():
    """The notebook's cells of code."""
    return [cell for cell in notebook().cells if cell.cell_type == "code"]


@pytest.fixture
def readme():
    """README's text."""
    return (ROOT / "README.md").read_text(encoding="utf-8")


def prose():
    """Return the text of the guides and of the notebook, by the place where it stands."""
    texts = {
        path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8")
        for path in GUIDES
    }
    cells = [cell for cell in notebook().cells if cell.cell_type == "markdown"]
    return texts | {f"project.ipynb, cell {cell.id}": cell.source for cell in cells}


def found(pattern, texts):
    """Return where the pattern stands in these texts, and what is in its group."""
    return [
        (p, match) for p, text in texts.items() for match in re.findall(pattern, text)
    ]


def assert_none(wrong):
    """Fail where anything is wrong, naming each place, and what it is."""
    assert not wrong, "\n" + "\n".join(f"{place}: {what}" for place, what in wrong)


def test_the_notebook_is_valid_and_was_executed_from_top_to_bottom(code):
    nbformat.validate(saved := notebook())
    assert (saved.nbformat, saved.nbformat_minor) == (4, 5)
    assert saved.metadata.kernelspec.name == "python3"
    assert "widgets" not in saved.metadata
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    assert [cell.id for cell in saved.cells if not cell.source.strip()] == []
    assert [
        c.id for c in saved.cells if not re.fullmatch("[a-z]+(-[a-z]+)*", c.id)
    ] == []


def test_the_notebooks_numbered_headings_count_from_1():
    texts = {place: text for place, text in prose().items() if "ipynb" in place}
    numbers = [int(number) for _, number in found(r"(?m)^## (\d+)\. ", texts)]
    assert numbers == list(range(1, len(numbers) + 1))


def test_the_outputs_show_no_path_of_a_machine(code):
    path = re.compile(r"(/root|/home|/tmp|/Users|[A-Z]:\\\\)")
    assert [c.id for c in code if path.search(json.dumps(c.outputs))] == []


def test_the_outputs_show_no_error_and_only_the_warning_that_the_text_explains(code):
    outputs = [(cell.id, out) for cell in code for out in cell.outputs]
    assert [i for i, out in outputs if out.output_type == "error"] == []
    errors = [(i, out.text) for i, out in outputs if out.get("name") == "stderr"]
    assert {i for i, text in errors if "Warning" in text or "WARNING" in text} == {
        "meet-warning"
    }


def test_every_figure_in_the_prose_is_one_of_the_notebooks_outputs(code):
    texts = {place: text for place, text in prose().items() if "your-turn" not in place}
    printed = "".join(
        output(notebook(), cell.id) for cell in code
    )  # ^ has its own tests
    figures = found(r"\b\d\.\d{4}\b", texts)
    assert_none([(place, figure) for place, figure in figures if figure not in printed])


def test_every_release_of_mlflow_in_the_prose_is_the_pinned_one_or_has_a_test():
    releases = found(r"(?i)\bmlflow(?:\[\w+\])?(?: |==)(\d+\.\d+\.\d+)", prose())
    pinned = re.search(r"(?m)^mlflow==(.+)", LOCK.read_text())[1]
    assert_none([r for r in releases if r[1] not in {pinned, *TESTED}])


def test_readmes_tables_are_those_of_the_notebook(readme):
    renewed = readme_with_its_tables(readme, notebook())
    assert readme == renewed, "run tests/maintain.py readme"


def for_windows(line):
    """Return a command of README's as it is in PowerShell."""
    line = line.replace("python3 -m", "py -m").replace(" && ", "; ")
    return line.replace(".venv/bin/", ".venv\\Scripts\\")


@pytest.mark.parametrize("last", ["nbconvert", "pytest"])
def test_readmes_commands_stand_there_for_windows_too(last):
    line = command("python3 -m venv", last)
    assert command("py -m venv", last, language="powershell") == for_windows(line)


def test_the_workflow_runs_readmes_command_on_every_system():
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "test.yml").read_text())
    job, line = workflow["jobs"]["test"], command("python3 -m venv", "pytest")
    systems = {name.split("-")[0] for name in job["strategy"]["matrix"]["system"]}
    assert systems == {"ubuntu", "macos", "windows"}
    run = [step["run"] for step in job["steps"] if "run" in step]
    assert run == [line, for_windows(line)]
    assert workflow["jobs"]["slow"]["steps"][-1]["run"] == ".ci/run"


def anchors(text):
    """Return the anchors that a text sets, and those that GitHub gives to its headings."""
    headings = re.findall(r"(?m)^#+ (.+)$", re.sub(r"(?ms)^ *```.*?^ *```", "", text))
    given = {re.sub(r"[^\w\- ]", "", h.lower()).replace(" ", "-") for h in headings}
    return given | set(re.findall(r'<a id="([^"]+)">', text))


def test_links_in_the_project_lead_to_a_file_and_to_a_heading_that_exist():
    def leads_somewhere(place, link):
        file, _, anchor = link.partition("#")
        here = ROOT / place.partition(",")[0]
        target = here.parent / file if file else here
        if not anchor or not target.exists():
            return target.exists()
        texts = [
            t for p, t in prose().items() if (ROOT / p.partition(",")[0]) == target
        ]
        return anchor in anchors("\n".join(texts))

    links = found(r"\]\((?!http)([^)\s]+)\)", prose())
    assert len(links) > 2
    assert_none([link for link in links if not leads_somewhere(*link)])


def test_readme_says_of_every_chosen_package_its_major_version(readme):
    chosen = LOCK.read_text(encoding="utf-8").split("# Block 2")[0]
    pins = re.findall(
        r"(?m)^([\w-]+)==(\d+)\S*$", chosen
    )  # all but those with a marker
    assert [" ".join(pin) for pin in pins if " ".join(pin) not in readme] == []


def test_every_file_that_the_prose_names_exists():
    files = found(r"(?<![\w./-])((?:tests|\.ci|\.github)/[\w./-]*\w)", prose())
    assert_none([(place, name) for place, name in files if not (ROOT / name).exists()])


def test_the_map_in_contributing_has_every_file_of_the_tests():
    drawn = re.findall(
        r"(?m)^\| `tests/(\w+\.py)` \|", prose()[".github/CONTRIBUTING.md"]
    )
    assert sorted(drawn) == sorted(path.name for path in ROOT.glob("tests/*.py"))


def test_every_test_that_the_prose_names_exists():
    tests = "".join(
        path.read_text(encoding="utf-8") for path in ROOT.glob("tests/*.py")
    )
    names = found(r"::(test_\w+)", prose())
    assert_none([(place, name) for place, name in names if f"def {name}(" not in tests])


def test_the_prose_names_the_experiment_and_the_model_as_the_notebook_does():
    names = {"README.md", ".github/TEAM-SERVER.md", "project.ipynb, cell first-read"}
    texts = {place: text for place, text in prose().items() if place in names}
    assert len(texts) == len(names)
    wanted = [(p, name) for p in texts for name in (EXPERIMENT, NAME)]
    assert_none([(p, f"no {name}") for p, name in wanted if name not in texts[p]])


def test_every_c_in_the_prose_is_that_of_a_run():
    passed = {f"{params['C']:g}" for _, params, _ in RUNS.values()}
    said = found(r"\bC=(\d+)", prose())
    assert_none([(place, f"C={c}") for place, c in said if c not in passed])


def test_the_list_before_the_training_names_every_metric():
    place = "project.ipynb, cell training-intro"
    names = [metric.replace("_", " ") for metric in METRICS]
    assert_none([(place, f"no {name}") for name in names if name not in prose()[place]])


@pytest.mark.parametrize("name", ["mlflow-run.png", "mlflow-version.png"])
def test_the_pictures_show_what_the_notebook_logs_today(name):
    then = Image.open(ROOT / "tests" / "images" / name).text.get("Description")
    assert then == pictured(), "run tests/maintain.py pictures"
