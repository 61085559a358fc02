"""requirements.txt is a complete lock, and installs and works wherever README says it does."""

import os
import shutil
import subprocess
import sys

import pytest
from helpers import ROOT, SCRIPTS, need, shell
from maintain import LOCK, renew

VERSIONS = ["3.11", "3.12", "3.13", "3.14"]
PLATFORMS = [
    "x86_64-unknown-linux-gnu",
    "aarch64-unknown-linux-gnu",
    "aarch64-apple-darwin",
    "x86_64-apple-darwin",
    "x86_64-pc-windows-msvc",
]


def test_the_lock_has_all_that_the_chosen_packages_need_and_nothing_else():
    assert renew(LOCK.read_text()) == LOCK.read_text(), "run tests/maintain.py lock"


@pytest.mark.slow
@pytest.mark.parametrize("platform", PLATFORMS)
@pytest.mark.parametrize("python", VERSIONS)
def test_the_lock_installs_from_wheels_alone_on(platform, python):
    command = [sys.executable, "-m", "uv", "pip", "compile", "--quiet", LOCK]
    command += ["--python", sys.executable, "--only-binary", ":all:"]
    command += ["--python-version", python, "--python-platform", platform]
    subprocess.run(command, check=True)


@pytest.mark.slow
@pytest.mark.parametrize(
    "version", [v for v in VERSIONS if v != f"3.{sys.version_info.minor}"]
)
def test_the_notebook_passes_on_python(tmp_path, version):
    env = os.environ | {"UV_PYTHON_DOWNLOADS": "never", "VIRTUAL_ENV": str(tmp_path)}
    if shutil.which("pyenv"):  # its Pythons answer only when they are named
        env["PYENV_VERSION"] = (
            shell("pyenv versions --bare", ROOT).strip().replace("\n", ":")
        )
    found = subprocess.run(
        [SCRIPTS / "uv", "python", "find", version], env=env, check=False
    )
    need(found.returncode == 0, f"no Python {version} on this machine")
    shell(f"uv venv -q --seed --clear -p {version} $VIRTUAL_ENV", ROOT, env)
    shell("uv pip install -q -r tests/requirements.txt", ROOT, env)
    shell("$VIRTUAL_ENV/bin/python -m pytest -k ipynb", ROOT, env)
