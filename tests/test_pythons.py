"""The notebook gives the same outputs on every Python that it promises to run on."""

import os
import shutil
import subprocess
import sys

import pytest
from helpers import ROOT, SCRIPTS, need, need_network

VERSIONS = {"3.11", "3.12", "3.13", "3.14"}  # nbval itself tests the one that runs the tests
UV = SCRIPTS / "uv"


@pytest.mark.slow
@pytest.mark.parametrize("version", sorted(VERSIONS - {f"3.{sys.version_info.minor}"}))
def test_the_notebook_passes_on_python(tmp_path, version):
    need_network()
    env = os.environ | {"UV_PYTHON_DOWNLOADS": "never", "VIRTUAL_ENV": str(tmp_path)}
    if shutil.which("pyenv"):  # its Pythons are on PATH, but answer only when they are named
        installed = subprocess.check_output(["pyenv", "versions", "--bare"], text=True)
        env["PYENV_VERSION"] = ":".join(installed.split())
    found = subprocess.run([UV, "python", "find", version], env=env, check=False)
    need(found.returncode == 0, f"no Python {version} on this machine")
    subprocess.run(
        [UV, "venv", "-q", "--seed", "--clear", "-p", version, tmp_path], env=env, check=True
    )
    needed = ROOT / "tests" / "requirements.txt"
    subprocess.run([UV, "pip", "install", "-q", "-r", needed], env=env, check=True)
    nbval = ["--nbval", "--nbval-sanitize-with", "tests/sanitize.cfg", "project.ipynb"]
    command = [tmp_path / "bin" / "python", "-m", "pytest", "-q", *nbval]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
