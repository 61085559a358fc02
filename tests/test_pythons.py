"""The notebook gives the same outputs on every Python that it promises to run on."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

VERSIONS = {"3.11", "3.12", "3.13", "3.14"}  # nbval itself tests the one that runs the tests
UV = str(Path(sys.executable).with_name("uv"))


@pytest.mark.slow
@pytest.mark.parametrize("version", sorted(VERSIONS - {f"3.{sys.version_info.minor}"}))
def test_the_notebook_passes_on_python(tmp_path, version):
    env = os.environ | {"UV_PYTHON_DOWNLOADS": "never", "VIRTUAL_ENV": str(tmp_path)}
    if shutil.which("pyenv"):  # its Pythons are on PATH, but answer only when they are named
        installed = subprocess.check_output(["pyenv", "versions", "--bare"], text=True)
        env["PYENV_VERSION"] = ":".join(installed.split())
    made = subprocess.run(
        [UV, "venv", "-q", "--seed", "--clear", "-p", version, tmp_path], env=env, check=False
    )
    if made.returncode != 0:
        pytest.skip(f"no Python {version} on this machine")
    needed = ROOT / "tests" / "requirements.txt"
    subprocess.run([UV, "pip", "install", "-q", "-r", needed], env=env, check=True)
    command = [tmp_path / "bin" / "python", "-m", "pytest", "-q", "-k", "project.ipynb"]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
