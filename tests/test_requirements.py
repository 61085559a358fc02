"""requirements.txt is a complete lock, and installs and works wherever README says it does."""

import os
import re
import shutil
import subprocess
import sys

import pytest
from helpers import ROOT, SCRIPTS, need, shell

LOCK = ROOT / "requirements.txt"
VERSIONS = ["3.11", "3.12", "3.13", "3.14"]
LINUX = ["x86_64-unknown-linux-gnu", "aarch64-unknown-linux-gnu"]
PLATFORMS = [
    *LINUX,
    "aarch64-apple-darwin",
    "x86_64-apple-darwin",
    "x86_64-pc-windows-msvc",
]


def requirements(text):
    return sorted(
        line for line in text.splitlines() if line and not line.startswith("#")
    )


@pytest.fixture
def compile_command():
    """The command at the top of the lock, for the Python that runs the tests."""
    (command,) = re.findall(
        r"^#   (uv pip compile .+)$", LOCK.read_text(), re.MULTILINE
    )
    # otherwise uv would look for every Python that it resolves for, and download it
    return f"{command} --python '{sys.executable}'"


def test_compiling_the_lock_again_changes_nothing(compile_command):
    assert requirements(shell(compile_command, ROOT)) == requirements(LOCK.read_text())


@pytest.mark.slow
@pytest.mark.parametrize("platform", PLATFORMS)
@pytest.mark.parametrize("python", VERSIONS)
def test_the_lock_installs_from_wheels_alone_on(compile_command, platform, python):
    command = re.sub(
        r"--universal --python-version \S+", "--only-binary :all:", compile_command
    )
    assert shell(
        f"{command} --python-version {python} --python-platform {platform}", ROOT
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    "version", [v for v in VERSIONS if v != f"3.{sys.version_info.minor}"]
)
def test_the_notebook_passes_on_python(tmp_path, version):
    env = os.environ | {"UV_PYTHON_DOWNLOADS": "never", "VIRTUAL_ENV": str(tmp_path)}
    if shutil.which(
        "pyenv"
    ):  # its Pythons are on PATH, but answer only when they are named
        env["PYENV_VERSION"] = (
            shell("pyenv versions --bare", ROOT).strip().replace("\n", ":")
        )
    found = subprocess.run(
        [SCRIPTS / "uv", "python", "find", version], env=env, check=False
    )
    need(found.returncode == 0, f"no Python {version} on this machine")
    shell(f"uv venv -q --seed --clear -p {version} $VIRTUAL_ENV", ROOT, env)
    shell("uv pip install -q -r tests/requirements.txt", ROOT, env)
    nbval = "--nbval --nbval-sanitize-with tests/sanitize.cfg -k project.ipynb"
    shell(f"$VIRTUAL_ENV/bin/python -m pytest {nbval}", ROOT, env)
