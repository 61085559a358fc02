"""The lock installs from wheels alone wherever README says it does. All slow."""

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
