"""The lock installs from wheels alone wherever README says it does, and works there. All slow."""

import os
import shutil
import subprocess

import pytest
from suite import ROOT, SCRIPTS

pytestmark = pytest.mark.slow
PLATFORMS = [
    "x86_64-unknown-linux-gnu",
    "aarch64-unknown-linux-gnu",
    "aarch64-apple-darwin",
    "x86_64-apple-darwin",
    "x86_64-pc-windows-msvc",
]


@pytest.mark.parametrize("platform", PLATFORMS)
@pytest.mark.parametrize("python", ["3.11", "3.12", "3.13", "3.14"])
def test_the_lock_installs_from_wheels_alone_on(platform, python):
    command = [SCRIPTS / "uv", "pip", "compile", "--quiet", ROOT / "requirements.txt"]
    command += ["--python", SCRIPTS / "python", "--only-binary", ":all:"]
    command += ["--python-version", python, "--python-platform", platform]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)


@pytest.mark.parametrize("version", ["3.13", "3.14"])
def test_the_notebook_passes_on_python(tmp_path, version):
    env = os.environ | {"UV_PYTHON_DOWNLOADS": "never"}
    del env["PYTEST_CURRENT_TEST"]
    if shutil.which("pyenv"):  # its Pythons answer only when they are named
        bare = subprocess.check_output(["pyenv", "versions", "--bare"], text=True)
        env["PYENV_VERSION"] = bare.strip().replace("\n", ":")
    uv = SCRIPTS / "uv"
    if subprocess.run([uv, "python", "find", version], env=env, check=False).returncode:
        pytest.skip(f"no Python {version} on this machine")
    python = tmp_path / "bin" / "python"
    make = [uv, "venv", "--quiet", "--seed", "--clear", "-p", version, tmp_path]
    tests = ROOT / "tests" / "requirements.txt"
    install = [uv, "pip", "install", "--quiet", "-p", python, "-r", tests]
    run = [python, "-m", "pytest", "-p", "no:cacheprovider", "project.ipynb"]
    for command in (make, install, run):
        subprocess.run(command, cwd=ROOT, env=env, check=True)
