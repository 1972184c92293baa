"""A real tritonserver, from nvidia-pytriton in an environment of its own, and runs to serve.

OPTIN_EXPORT_TRITON names that environment; where it does not exist yet, it is made there (a few minutes, from PyPI).
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from optin_export.errors import EnvironmentLacks
from optin_export.serving.server import ENVIRONMENT, PYTRITON, Program, find
from tests.conftest import ROOT


@pytest.fixture(scope="session")
def program() -> Program:
    place = os.environ.get(ENVIRONMENT)
    if not place:
        pytest.skip(f"no tritonserver: set {ENVIRONMENT} to a folder in which an environment for it may be made")
    if not Path(place).exists():
        packages = [PYTRITON, "onnxruntime", "tokenizers", "pillow"]
        for command in ([sys.executable, "-m", "venv", place], [f"{place}/bin/pip", "install", "-q", *packages]):
            made = subprocess.run(command, capture_output=True, text=True)
            if made.returncode:
                pytest.skip(f"no tritonserver: {' '.join(command)} failed: {made.stderr.strip()[-300:]}")
    try:
        return find(place)
    except EnvironmentLacks as error:
        pytest.skip(f"no tritonserver: {error.what}: {error.why}")


@pytest.fixture(scope="session")
def quickstart(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run of recipes/quickstart.yaml, by the command; its speedup is not judged on a busy machine."""
    folder = tmp_path_factory.mktemp("runs") / "quickstart"
    recipe = str(ROOT / "recipes" / "quickstart.yaml")
    settings = ["--set", "gates.speedup=0.5", "--set", "gates.other_work=1"]
    command = [sys.executable, "-m", "optin_export", recipe, "--out", str(folder), *settings]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    return folder
