"""Commands that only read what a run has written: a serving host or a CI job has no torch for them."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from optin_export import cli
from tests.conftest import ROOT

#: Runs commands in one fresh process that cannot import torch; prints every exit code.
SCRIPT = """
import sys
sys.modules["torch"] = None
from optin_export import cli
commands = [line.split("|") for line in sys.argv[1:]]
print([cli.main(words) for words in commands])
print(sorted({"torch", "transformers", "timm", "onnxruntime"} & {name for name, found in sys.modules.items() if found}))
"""


def test_commands_on_finished_runs_need_no_torch(run: Path, tmp_path: Path) -> None:
    pytest.importorskip("tritonclient.grpc")
    place = tmp_path / "models"
    for settings in ([], ["--set", "ship.layout=versions"]):
        assert cli.main(["ship", str(run), "--to", str(place), *settings]) == 0
    shutil.copytree(run, tmp_path / "second")
    commands = [
        ["verify", str(run)],
        ["verify", str(place)],
        ["check", str(run)],
        ["compare", str(run), str(tmp_path / "second"), "--out", str(tmp_path / "compare.html")],
        ["rollback", str(place), "tiny"],
        ["client", "grpc://127.0.0.1:9", "--model", "a", "--model", "b", "--run", str(run), "--timeout", "0.2"],
    ]
    words = ["|".join(command) for command in commands]
    done = subprocess.run([sys.executable, "-c", SCRIPT, *words], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    *_, codes, imported = done.stdout.splitlines()
    assert (codes, imported) == ("[0, 0, 0, 0, 0, 5]", "[]"), done.stdout + done.stderr


def test_what_the_client_measures_with_needs_no_torch() -> None:
    script = (
        "import sys; sys.modules['torch'] = None; import optin_export.serving.deployed, optin_export.serving.shadow, "
        "optin_export.serving.perf_analyzer, optin_export.report.deployed, optin_export.report.html"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
