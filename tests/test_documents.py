"""The notebook file and README: well formed, and true to each other."""

import json
import re

import nbformat
import pytest
import yaml
from helpers import ROOT, commands, notebook, output, section


@pytest.fixture
def code():
    return [cell for cell in notebook().cells if cell.cell_type == "code"]


@pytest.fixture
def text():
    """What the notebook's Markdown cells say, by their ids."""
    return {
        cell.id: cell.source
        for cell in notebook().cells
        if cell.cell_type == "markdown"
    }


@pytest.fixture
def readme():
    return (ROOT / "README.md").read_text(encoding="utf-8")


def table(text):
    """Return the rows of a Markdown table, each a list of its cells, without the header."""
    rows = [line for line in text.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in row.strip("|").split("|")] for row in rows[2:]]


def test_the_notebook_is_valid_and_was_executed_from_top_to_bottom(code):
    nbformat.validate(saved := notebook())
    assert (saved.nbformat, saved.nbformat_minor) == (4, 5)
    assert (
        saved.metadata.kernelspec.name == "python3" and "widgets" not in saved.metadata
    )
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    assert all(cell.source.strip() for cell in saved.cells)
    ids = [cell.id for cell in saved.cells]
    assert [
        i for i in ids if not re.fullmatch(r"[a-z]+(-[a-z]+)*", i) or ids.count(i) > 1
    ] == []


def test_the_outputs_show_no_path_of_a_machine_and_no_error_that_the_text_does_not_explain(
    code,
):
    outputs = [(cell.id, out) for cell in code for out in cell.outputs]
    path = re.compile(r"(/root|/home|/tmp|/Users|[A-Z]:\\\\)")
    assert [i for i, out in outputs if path.search(json.dumps(out))] == []
    errors = {
        i
        for i, out in outputs
        if "error" in out.output_type or out.get("name") == "stderr"
    }
    assert errors == {"meet-warning", "run-lbfgs", "run-newton-cg"}


def test_every_figure_and_release_in_the_text_is_one_of_the_notebooks_own(
    code, text, readme
):
    del text["your-turn"]  # the tests of the exercises read these
    prose = readme + "".join(text.values())
    printed = "".join(output(notebook(), cell.id) for cell in code)
    figures = set(re.findall(r"\b\d\.\d{4}\b", prose))
    assert figures >= {"0.9667", "1.0000", "0.1589", "0.0758"}
    assert [figure for figure in figures if figure not in printed] == []
    release = re.search(
        r"^mlflow==(.+)", (ROOT / "requirements.txt").read_text(), re.MULTILINE
    )[1]
    assert set(re.findall(r"(?:MLflow |==)(\d\.\d+\.\d+)", prose)) == {
        release,
        "2.16.2",
    }


def test_readmes_tables_are_those_of_the_notebook():
    def joined(
        cell_id, index
    ):  # pandas breaks a wide table in two; each half repeats the index
        halves = [
            half.splitlines() for half in output(notebook(), cell_id).split("\n\n")
        ]
        rows = [left.split() + right.split()[index:] for left, right in zip(*halves)]
        return [row for row in rows if row[0].isdigit()]

    versions, sample = re.findall(
        r"(?:^\|.*\n)+", section("What comes out"), re.MULTILINE
    )
    shown = [
        line.split()[1:]
        for line in output(notebook(), "list-versions").splitlines()[1:]
    ]
    assert [" ".join(row).split() for row in table(versions)] == shown
    better = [["2", *row] for row in joined("reload-models", index=1)]
    assert table(sample) == better + joined("find-mistakes", index=2)


@pytest.mark.parametrize("heading", ["Run it", "Test it"])
def test_readme_opens_with_its_one_command_under(heading):
    (command,) = commands(heading)
    assert section(heading).strip().startswith(f"```bash\n{command}```")
    assert command.count("\n") == 1
    assert for_windows(command) in commands("Windows and uv", "powershell")[0]


def for_windows(command):
    command = command.replace("python3 -m", "py -m").replace(" && ", "; ")
    return command.replace(".venv/bin/", ".venv\\Scripts\\")


def test_the_workflow_runs_readmes_command_on_every_system():
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "test.yml").read_text())
    job, command = workflow["jobs"]["test"], commands("Test it")[0].strip()
    systems = {name.split("-")[0] for name in job["strategy"]["matrix"]["system"]}
    assert systems == {"ubuntu", "macos", "windows"}
    run = [step["run"] for step in job["steps"] if "run" in step]
    assert run == [command, for_windows(command)]
    assert workflow["jobs"]["slow"]["steps"][-1]["run"] == ".ci/run"
    assert set(workflow[True]) == {
        "push",
        "pull_request",
        "schedule",
    }  # YAML reads on: as True


def test_what_the_documents_promise_or_link_to_in_the_project_is_there(text, readme):
    promised = re.findall(r"^(\d+)\. ", text["title"], re.MULTILINE)
    prose = "\n".join(text.values())
    assert re.findall(r"^## (\d+)\. ", prose, re.MULTILINE) == promised
    targets = re.findall(r"\]\((?!http)([^)#]+)\)", readme + prose)
    assert {"tests/images/mlflow-run.png", "tests/images/mlflow-version.png"} <= set(
        targets
    )
    assert [target for target in targets if not (ROOT / target).exists()] == []


def test_readme_says_of_every_chosen_package_its_major_version_and_what_it_is_for():
    lock = (ROOT / "requirements.txt").read_text(encoding="utf-8")
    chosen = re.findall(
        r"^([a-z-]+)==(\d+)", lock.split("\n# Block 2")[0], re.MULTILINE
    )
    said = ", ".join(row[0] for row in table(section("The libraries")))
    missing = {name for name, major in chosen if f"{name} {major}" not in said}
    assert missing == {"cryptography"}  # which is pinned for the sake of one platform
