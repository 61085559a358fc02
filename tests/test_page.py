"""The notebook's file, the documents and the lock: well formed, and true to each other."""

import json
import re
import shutil
import subprocess

import nbformat
import pytest
import yaml
from suite import ROOT, SCRIPTS, commands, read_notebook, shown

DOCUMENTS = [ROOT / "README.md", *ROOT.glob(".github/*.md")]


@pytest.fixture
def code():
    """The notebook's cells of code."""
    return [cell for cell in read_notebook().cells if cell.cell_type == "code"]


def prose():
    """Return all text by the place where it stands: a document, or a cell's id."""
    cells = [cell for cell in read_notebook().cells if cell.cell_type == "markdown"]
    texts = {path.name: path.read_text(encoding="utf-8") for path in DOCUMENTS}
    return texts | {cell.id: cell.source for cell in cells}


def found(pattern, texts):
    """Return where the pattern stands in these texts, and what is in its group."""
    return [(p, hit) for p, text in texts.items() for hit in re.findall(pattern, text)]


def test_the_notebook_is_valid_and_was_executed_from_top_to_bottom(code):
    nbformat.validate(saved := read_notebook())
    assert (saved.nbformat, saved.nbformat_minor) == (4, 5)
    assert saved.metadata.kernelspec.name == "python3"
    assert "widgets" not in saved.metadata
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    ids = [cell.id for cell in saved.cells]
    assert [i for i in ids if not re.fullmatch("[a-z]+(-[a-z]+)*", i)] == []
    assert [cell.id for cell in saved.cells if not cell.source.strip()] == []
    assert [cell.id for cell in saved.cells if cell.metadata] == []  # times, say


def test_the_numbered_headings_count_from_1():
    text = "\n".join(cell.source for cell in read_notebook().cells)
    numbers = [int(number) for number in re.findall(r"(?m)^## (\d+)\. ", text)]
    assert numbers == list(range(1, len(numbers) + 1))


def test_the_outputs_show_no_error_no_path_and_no_stream_that_is_not_explained(code):
    path = re.compile(r"/root|/home|/tmp|/Users|[A-Z]:\\\\")
    assert [cell.id for cell in code if path.search(json.dumps(cell.outputs))] == []
    outputs = [(cell.id, out) for cell in code for out in cell.outputs]
    assert [i for i, out in outputs if out.output_type == "error"] == []
    errors = [i for i, out in outputs if out.get("name") == "stderr"]
    assert errors == ["register"]


def test_the_saved_addresses_are_the_one_that_the_page_names(code):
    addresses = re.findall(r"http://127\.0\.0\.1:\d+", str([c.outputs for c in code]))
    (named,) = set(re.findall(r"Uvicorn running on `?(http://\S+?)`", str(prose())))
    assert set(addresses) == {named} and f'"{named}"' in code[0].source


def test_every_figure_in_the_prose_is_in_an_output():
    """The exercises' figures have their own tests, in test_variations.py."""
    texts = {p: text for p, text in prose().items() if not p.startswith("exercise")}
    notebook = read_notebook()
    outputs = "".join(
        shown(notebook, cell.id) for cell in notebook.cells if "outputs" in cell
    )
    figures = found(r"\b\d\.\d{4}\b", texts)
    assert figures and [hit for hit in figures if hit[1] not in outputs] == []


def test_readmes_tables_have_the_notebooks_rows(code):
    html = str(
        [out.data.get("text/html") for c in code for out in c.outputs if "data" in out]
    )
    rows = re.findall(r"<tr.*?</tr>", html, re.DOTALL)
    rows = [re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", row) for row in rows]
    compared = [
        set(re.findall(r"metrics\.\w+", t)) for t in (html, prose()["README.md"])
    ]
    assert compared[0] == compared[1]
    tables = re.findall(
        r"(?m)^\| (?=[\w-]+(?:, C=\d+)? \| [\d.]+ \|)(.+) \|$", prose()["README.md"]
    )
    assert len(tables) == 8
    lines = [line.split(" | ") for line in tables]
    assert [
        line for line in lines if not any(r[: len(line)] == line for r in rows)
    ] == []


def test_the_comparison_reads_the_better_run_first():
    cells = {cell.id: cell for cell in read_notebook().cells}
    html = cells["compare-runs"].outputs[0].data["text/html"]
    better, other, _ = re.findall(r"(?s)<tr>(?:(?!<tr>).)*?<td>.*?</tr>", html)
    figures = r"\b\d\.\d{4}\b"
    pairs = zip(re.findall(figures, better), re.findall(figures, other), strict=True)
    read = re.findall(figures, cells["compare-read"].source)
    assert len(read) >= 4 and read == [f for pair in pairs for f in pair][: len(read)]


def test_the_row_in_the_prose_is_where_the_models_disagree():
    notebook = read_notebook()
    (row,) = {row for _, row in found(r"Row (\d+)", prose())}
    assert f"disagrees in rows [{row}]\n" in shown(notebook, "reload-models")


def test_every_run_and_experiment_in_the_prose_is_in_an_output():
    named = found(r"experiment \*([^*]+)\*|\*([\w-]+, C=\d+)\*", prose())
    outputs = json.dumps([cell.get("outputs") for cell in read_notebook().cells])
    names = [(place, re.escape("".join(groups))) for place, groups in named]
    assert names and [n for n in names if not re.search(rf"{n[1]}\b", outputs)] == []


def test_every_release_of_mlflow_in_the_prose_is_the_pinned_one():
    lock = (ROOT / "requirements.txt").read_text()
    pinned = re.search(r"(?m)^mlflow==(\S+)", lock)[1]
    texts = {p: re.sub(r"(?m)^[\w-]+==.+$", "", text) for p, text in prose().items()}
    releases = found(r"(?<![\d.])(\d+\.\d+\.\d+)(?!\.?\d)", texts)
    assert [hit for hit in releases if hit[1] not in {pinned, "2.16.2"}] == []


def test_the_chosen_packages_are_the_ones_in_readme_and_on_the_page():
    chosen = (ROOT / "tests" / "requirements.in").read_text()
    quoted = found(r"(?m)^([\w-]+==.+)$", prose())
    assert quoted and [hit for hit in quoted if hit[1] not in chosen.splitlines()] == []
    pins = re.findall(r"(?m)^([\w-]+)==(\d+)\S*$", chosen)  # not those with a marker
    assert [p for p in pins if " ".join(p) not in prose()["README.md"]] == []


def test_links_and_names_of_files_in_the_project_lead_somewhere():
    places = {path.name: path.parent for path in DOCUMENTS}
    links = found(r"\]\((?!http)([^)\s#]+)\)", prose())
    files = found(r"`((?:tests|\.ci|\.github)/[\w./-]*\w)`", prose())
    wanted = [(places.get(place, ROOT) / name) for place, name in links]
    wanted += [ROOT / name for _, name in files]
    assert len(wanted) > 9 and [path for path in wanted if not path.exists()] == []


def test_the_lock_is_complete_and_made_by_the_pages_own_command(tmp_path):
    (command,) = [text for _, text in found(r"(?m)^uv pip compile .+", prose())][:1]
    assert command in (ROOT / "requirements.txt").read_text()
    (tmp_path / "tests").mkdir()
    for name in ("requirements.txt", "tests/requirements.in"):
        shutil.copy(ROOT / name, tmp_path / name)
    uv = [
        SCRIPTS / "uv",
        *command.split()[1:],
        "--quiet",
        "--python",
        SCRIPTS / "python",
    ]
    subprocess.run(uv, cwd=tmp_path, check=True)
    renewed = (tmp_path / "requirements.txt").read_text().splitlines()[2:]
    assert renewed == (ROOT / "requirements.txt").read_text().splitlines()[2:]


def test_the_workflow_runs_readmes_test_command():
    (test_it,) = commands("Test it")
    workflow = (ROOT / ".github" / "workflows" / "test.yml").read_text()
    steps = yaml.safe_load(workflow)["jobs"]["test"]["steps"]
    assert test_it.strip() in [step.get("run", "").strip() for step in steps]
