"""The drills of .github/CONTRIBUTING.md: `python tests/maintain.py notebook | lock | readme | pictures`."""

import argparse
import base64
import os
import re
import subprocess
import sys
from io import BytesIO
from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryDirectory

import nbformat
import pytest
from bs4 import BeautifulSoup
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOK, README = ROOT / "project.ipynb", ROOT / "README.md"
LOCK = ROOT / "requirements.txt"
BLOCK_2 = "# Block 2: what those pull in, resolved by uv\n"
PICTURES = [
    "test_the_page_of_a_run_shows_what_was_logged_and_the_figure_as_an_image",
    "test_the_registered_model_shows_its_versions_and_the_champion_its_signature",
]


# The notebook


class KeepCells:
    """A pytest plugin that remembers nbval's cells, which hold what they have put out."""

    def pytest_collection_finish(self, session):
        """Remember them."""
        self.cells = session.items


def execute_and_save():
    """Execute the notebook with nbval; where anything put out is not the same, save it all, else none.

    nbval does not compare images: they are the same if their pixels are.
    """
    status = pytest.main(["-k", "ipynb"], plugins=[kept := KeepCells()])
    if status > pytest.ExitCode.TESTS_FAILED:
        sys.exit(status)
    new = [cell.test_outputs for cell in kept.cells]
    if None in new or any(out.output_type == "error" for outs in new for out in outs):
        sys.exit("The notebook did not reach its end; nothing was saved.")
    saved = nbformat.read(NOTEBOOK, as_version=4)
    code = [cell for cell in saved.cells if cell.cell_type == "code"]
    other = bool(status) or any(
        cell.execution_count is None or pixels(cell.outputs) != pixels(outputs)
        for cell, outputs in zip(code, new, strict=True)
    )
    for count, (cell, outputs) in enumerate(zip(code, new), start=1):
        # what a process prints on its two streams arrives in no fixed order
        outputs.sort(key=lambda out: {"stdout": 0, "stderr": 1}.get(out.get("name"), 2))
        if other:
            cell.outputs = outputs
        cell.execution_count = count
        for out in cell.outputs:
            if out.output_type == "execute_result":
                out.execution_count = count
    nbformat.write(saved, NOTEBOOK)
    print("All outputs are new." if other else "The outputs are the same.")


def pixels(outputs):
    """Return what the images among a cell's outputs show."""
    images = [
        out.data["image/png"] for out in outputs if "image/png" in out.get("data", {})
    ]
    return [Image.open(BytesIO(base64.b64decode(image))).tobytes() for image in images]


# README


def readme_with_its_tables(readme, notebook):
    """Return README with the tables that come from the notebook's outputs as they are there."""
    header, versions = frame(notebook, "list-versions")
    readme = with_table(readme, header[1:], [row[1:] for row in versions])
    (champion,) = [row[1] for row in versions if "champion" in row]
    header, mistakes = frame(notebook, "find-mistakes")
    _, sample = frame(notebook, "reload-models")
    return with_table(readme, header, [[champion, *row] for row in sample] + mistakes)


def frame(notebook, cell_id):
    """Return a DataFrame that a cell shows: the names of index and columns, and the rows, as texts."""
    (cell,) = [cell for cell in notebook.cells if cell.id == cell_id]
    html = BeautifulSoup(cell.outputs[-1].data["text/html"], "html.parser")
    rows = [[c.text for c in tr.find_all(["th", "td"])] for tr in html.find_all("tr")]
    count = len(html.thead.find_all("tr"))
    header = ["".join(names) for names in zip(*rows[:count])]
    rows = rows[count:]
    for above, row in pairwise(rows):  # an index's repeated value is shown once
        row[:0] = above[: len(header) - len(row)]
    return header, rows


def with_table(text, header, rows):
    """Return Markdown in which the table with this header has these rows."""
    lines = [f"| {' | '.join(row)} |".replace("|  |", "| |") for row in [header, *rows]]
    lines.insert(1, "| --- " * len(header) + "|")
    start = "".join(re.escape(line) + "\n" for line in lines[:2])
    there = re.search(rf"^{start}(?:\|.*\n)*", text, re.MULTILINE)
    assert there, f"no table has the header {lines[0]}"
    return text.replace(there[0], "\n".join(lines) + "\n")


def update_readme():
    """Bring README's tables in line with the notebook's outputs."""
    saved = nbformat.read(NOTEBOOK, as_version=4)
    text = README.read_text(encoding="utf-8")
    README.write_text(readme_with_its_tables(text, saved), encoding="utf-8")


# The lock


def resolve(requirements, present, *options):
    """Return the pins that uv finds for the requirements, the present ones where they fit."""
    with TemporaryDirectory() as folder:
        (pins := Path(folder) / "pins.txt").write_text(present)
        command = [sys.executable, "-m", "uv", "pip", "compile", "-", "-o", pins]
        command += ["--quiet", "--universal", "--python-version", "3.11"]
        command += ["--no-annotate", "--no-header", *options]
        command += ["--python", sys.executable]  # or uv would download a 3.11
        subprocess.run(command, input=requirements, text=True, check=True)
        return pins.read_text()


def renew(lock, package=None):
    """Return the lock, resolved from block 1: one package renewed (NAME or NAME==VERSION), or "all".

    A chosen package gets one release for all Pythons. A pin with a marker is renewed by hand.
    """
    chosen, options, name = lock.split(BLOCK_2)[0], [], ""
    if package == "all":
        options, name = ["--upgrade"], r"[\w-]+"
    elif package:
        options, name = ["--upgrade-package", package], package.split("==")[0]
        if f"\n{name}==" not in lock:
            sys.exit(f"{name} is not in the lock.")
        if re.search(rf"^{name}==.*;", chosen, re.MULTILINE):
            sys.exit(f"{name} has a marker in block 1: renew it by hand.")
    freed = r"\1" if package == "all" else package
    free = re.sub(rf"^({name})==[^ ;\n]+$", freed or "", chosen, flags=re.MULTILINE)
    if free != chosen:
        found = resolve(free, lock, *options, "--fork-strategy", "fewest")
        chosen = re.sub(
            r"^([\w-]+==)[^ ;\n]+$",
            lambda pin: re.search(rf"^{pin[1]}\S+", found, re.MULTILINE)[0],
            chosen,
            flags=re.MULTILINE,
        )
    pins, known = resolve(chosen, lock, *options).splitlines(), chosen.splitlines()
    return chosen + BLOCK_2 + "".join(f"{pin}\n" for pin in pins if pin not in known)


def update_lock(package):
    """Renew the lock and install it here. Where it changes, execute the notebook with it."""
    LOCK.write_text(renewed := renew(before := LOCK.read_text(), package))
    install = ["-m", "uv", "pip", "install", "--python"]
    wanted = ["-r", ROOT / "tests" / "requirements.txt"]
    subprocess.run([sys.executable, *install, sys.executable, *wanted], check=True)
    if renewed == before:
        return print("The lock is as it was, and installed.")
    subprocess.run([sys.executable, __file__, "notebook"], check=True)


def main():
    """Do what the command line says."""
    parser = argparse.ArgumentParser(description=__doc__)
    drills = parser.add_subparsers(dest="drill", required=True)
    drills.add_parser(
        "notebook", help="execute it and save what has changed; README's tables"
    )
    lock = drills.add_parser("lock", help="resolve it from block 1; then the notebook")
    which = lock.add_mutually_exclusive_group()
    which.add_argument("--upgrade", action="store_const", const="all", dest="package")
    which.add_argument("--upgrade-package", metavar="NAME[==VERSION]", dest="package")
    drills.add_parser("readme", help="its tables from the notebook's outputs")
    drills.add_parser("pictures", help="of MLflow's page, again")
    given = parser.parse_args()
    os.chdir(ROOT)
    if given.drill == "notebook":
        execute_and_save()
    if given.drill in ("notebook", "readme"):
        update_readme()
    if given.drill == "lock":
        update_lock(given.package)
    if given.drill == "pictures":
        os.environ["SAVE_PICTURES"] = "1"
        sys.exit(pytest.main([f"tests/test_browser.py::{name}" for name in PICTURES]))


if __name__ == "__main__":
    main()
