"""The notebook file and README: well formed, consistent with each other, and nothing made up."""

import json
import re
import subprocess
import sys

import nbformat
import pytest
import yaml
from conftest import ROOT, output

NOTEBOOK = nbformat.read(ROOT / "project.ipynb", as_version=4)
CODE = [cell for cell in NOTEBOOK.cells if cell.cell_type == "code"]
OUTPUTS = [(cell.id, out) for cell in CODE for out in cell.outputs]
PROSE = "\n".join(cell.source for cell in NOTEBOOK.cells if cell.cell_type == "markdown")
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_notebook_is_valid_and_was_executed_from_top_to_bottom():
    nbformat.validate(NOTEBOOK)
    assert (NOTEBOOK.nbformat, NOTEBOOK.nbformat_minor) == (4, 5)
    assert NOTEBOOK.metadata.kernelspec.name == "python3"
    assert [cell.execution_count for cell in CODE] == list(range(1, len(CODE) + 1))
    assert all(cell.source.strip() for cell in NOTEBOOK.cells)


def test_cell_ids_are_words():
    ids = [cell.id for cell in NOTEBOOK.cells]
    assert len(set(ids)) == len(ids)
    assert [id for id in ids if not re.fullmatch(r"[a-z]+(-[a-z]+)*", id)] == []


def test_the_only_messages_on_standard_error_are_those_that_the_text_explains():
    cells = {id for id, out in OUTPUTS if out.get("name") == "stderr"}
    assert cells == {"meet-warning", "run-lbfgs", "run-newton-cg"}


def test_the_notebook_renders_anywhere():
    assert "widgets" not in NOTEBOOK.metadata
    assert [id for id, out in OUTPUTS if out.output_type == "error"] == []
    large = [id for id, out in OUTPUTS if len(out.get("data", {}).get("text/html", "")) > 20_000]
    assert large == []
    assert [
        id for id, out in OUTPUTS if "<script" in out.get("data", {}).get("text/html", "")
    ] == []
    assert (ROOT / "project.ipynb").stat().st_size < 400_000


def test_no_output_shows_a_path_of_the_machine_that_made_it():
    path = re.compile(r"(/root|/home|/tmp|/Users|[A-Z]:\\\\)")
    assert [id for id, out in OUTPUTS if path.search(json.dumps(out))] == []


def test_the_code_is_formatted_and_free_of_lint():
    for check in (["format", "--check"], ["check"]):
        command = [sys.executable, "-m", "ruff", *check, "--line-length", "100", "."]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("text", [PROSE, README], ids=["notebook", "README"])
def test_every_figure_in_the_text_is_one_that_the_notebook_printed(text):
    printed = "".join(output(NOTEBOOK, cell.id) for cell in CODE)
    figures = set(re.findall(r"\b\d\.\d{4}\b", text))
    assert figures >= {"0.9667", "1.0000", "0.1589", "0.0758"}
    assert [figure for figure in figures if figure not in printed] == []


def test_the_sample_rows_in_readme_are_those_of_the_notebook():
    table = README.split("first five test flowers:\n\n")[1].split("\n\n")[0].splitlines()
    # pandas breaks a wide table in two; each half repeats the index.
    left, right = (half.splitlines()[1:] for half in output(NOTEBOOK, "predict").split("\n\n"))
    shown = [a.split() + b.split()[1:] for a, b in zip(left, right)]
    assert [line.replace("|", " ").split() for line in table[2:]] == shown


def test_every_section_that_the_opening_promises_is_there():
    promised = re.findall(r"^(\d)\. ", NOTEBOOK.cells[0].source, re.MULTILINE)
    assert re.findall(r"^## (\d)\. ", PROSE, re.MULTILINE) == promised


@pytest.mark.parametrize("heading", ["Run it", "Test it"])
def test_readme_gives_one_command_under(heading):
    section = README.split(f"## {heading}\n")[1].split("\n## ")[0]
    (block,) = re.findall(r"```bash\n(.*?)```", section, re.DOTALL)
    assert len(block.splitlines()) == 1


def test_what_readme_links_to_in_the_project_exists():
    targets = re.findall(r"\]\((?!http)([^)#]+)\)", README)
    assert targets
    assert [target for target in targets if not (ROOT / target).exists()] == []


def test_readme_says_of_every_chosen_package_what_it_is_for():
    block = (ROOT / "requirements.txt").read_text().split("# Block 1")[1].split("# Block 2")[0]
    chosen = set(re.findall(r"^([a-z-]+)==", block, re.MULTILINE)) - {"cryptography"}
    table = README.split("| library |")[1].split("\n\n")[0]
    assert [name for name in chosen if name not in table] == []


def test_the_workflow_runs_readmes_commands_on_every_system():
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "test.yml").read_text())
    commands = [step["run"] for step in workflow["jobs"]["test"]["steps"] if "run" in step]
    assert len(commands) == 2
    assert [command for command in commands if f"{command}\n```" not in README] == []
