"""Commands that only read what a run has written: a serving host or a CI job has no torch for them."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from optin_export import cli
from tests.conftest import ROOT

#: Libraries that take a tenth of a second or more to import, or that a serving host need not have.
HEAVY = (
    *("torch", "transformers", "timm", "onnx", "onnxruntime", "torchmetrics", "scipy", "matplotlib", "numpy"),
    *("pydantic", "yaml", "jinja2", "rich", "psutil", "fsspec", "tritonclient"),
)
#: What a command needs of them for its work. The models of recipes are not among it.
NEEDED = {
    "verify": set(),
    "rollback": set(),
    "check": {"pydantic"},
    "client": {"pydantic", "numpy", "tritonclient"},
    "compare": {"pydantic", "numpy", "tritonclient", "matplotlib", "jinja2", "yaml"},
}
#: Runs commands in one fresh process that cannot import torch; the last line: exit code and imports after each.
SCRIPT = """
import sys, json
sys.modules["torch"] = None
from optin_export import cli
heavy, found = json.loads(sys.argv[1]), []
for words in sys.argv[2:]:
    code = cli.main(words.split("|"))
    found.append([code, [name for name in heavy if sys.modules.get(name)], "optin_export.recipe.schema" in sys.modules])
print(json.dumps(found))
"""


def after(commands: list[list[str]]) -> list[tuple[int, set[str], bool]]:
    """Of each command: exit code, which of HEAVY it or an earlier one imported, and whether recipes' models were."""
    words = [json.dumps(HEAVY), *("|".join(command) for command in commands)]
    done = subprocess.run([sys.executable, "-c", SCRIPT, *words], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return [(code, set(names), models) for code, names, models in json.loads(done.stdout.splitlines()[-1])]


def test_help_is_printed_before_anything_heavy_is_imported() -> None:
    for name, found in zip(NEEDED, after([[name, "--help"] for name in NEEDED]), strict=True):
        assert found == (0, set(), False), name


def test_commands_on_finished_runs_need_no_torch(run: Path, tmp_path: Path) -> None:
    pytest.importorskip("tritonclient.grpc")
    place = tmp_path / "models"
    for settings in ([], ["--set", "ship.layout=versions"]):
        assert cli.main(["ship", str(run), "--to", str(place), *settings]) == 0
    shutil.copytree(run, tmp_path / "second")
    commands = [
        ["verify", str(run)],
        ["verify", str(place)],
        ["rollback", str(place), "tiny"],
        ["check", str(run)],
        ["client", "grpc://127.0.0.1:9", "--model", "a", "--model", "b", "--run", str(run), "--timeout", "0.2"],
        ["compare", str(run), str(tmp_path / "second"), "--out", str(tmp_path / "compare.html")],
    ]
    for (name, *_), found in zip(commands, after(commands), strict=True):
        code, imported, models = found
        assert code == (5 if name == "client" else 0), name
        assert imported <= NEEDED[name] and not models, f"{name}: {imported - NEEDED[name] or 'models of recipes'}"


def test_what_the_client_measures_with_needs_no_torch() -> None:
    script = (
        "import sys; sys.modules['torch'] = None; import optin_export.serving.deployed, optin_export.serving.shadow, "
        "optin_export.serving.perf_analyzer, optin_export.report.deployed, optin_export.report.html"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
