"""requirements.txt is a complete lock that installs from wheels wherever README says it does."""

import re
import shutil
import subprocess
import sys
from importlib.metadata import version

import pytest
from helpers import ROOT, SCRIPTS, need_network, shell
from packaging.requirements import Requirement

LOCK = ROOT / "requirements.txt"
PLATFORMS = [
    "x86_64-unknown-linux-gnu",
    "aarch64-unknown-linux-gnu",
    "aarch64-apple-darwin",
    "x86_64-apple-darwin",
    "x86_64-pc-windows-msvc",
]


def requirements(text):
    return sorted(line for line in text.splitlines() if line and not line.startswith("#"))


def compile_lock(*options):
    # --python: otherwise uv would look for every Python that it resolves for, and download it
    python = ["--python", sys.executable]
    need_network()
    command = [
        SCRIPTS / "uv",
        "pip",
        "compile",
        "-q",
        LOCK,
        *python,
        "--no-annotate",
        "--no-header",
        *options,
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return requirements(done.stdout)


def test_the_tests_run_in_the_environment_that_the_lock_describes():
    for line in requirements(LOCK.read_text()):
        requirement = Requirement(line)
        if requirement.marker is None or requirement.marker.evaluate():
            assert requirement.specifier.contains(version(requirement.name)), line


def test_compiling_the_lock_again_changes_nothing():
    again = compile_lock("--universal", "--python-version", "3.11")
    assert again == requirements(LOCK.read_text())


@pytest.mark.slow
@pytest.mark.parametrize("platform", PLATFORMS)
@pytest.mark.parametrize("python", ["3.11", "3.12", "3.13", "3.14"])
def test_the_lock_installs_from_wheels_alone_on(platform, python):
    options = ["--python-version", python, "--python-platform", platform]
    assert compile_lock(*options, "--only-binary", ":all:")


@pytest.mark.slow
def test_the_command_at_the_top_of_the_lock_renews_it(tmp_path):
    shutil.copy(LOCK, tmp_path)
    command = "\n".join(re.findall(r"^#   (.+)$", LOCK.read_text(), re.MULTILINE))
    need_network()
    shell(command, tmp_path)
    head, renewed = (tmp_path / "requirements.txt").read_text().split("\n# Block 2")
    assert head == LOCK.read_text().split("\n# Block 2")[0]
    assert len(requirements(renewed)) > 100
    assert [path.name for path in tmp_path.iterdir()] == ["requirements.txt"]
