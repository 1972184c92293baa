"""Every example runs: numbered, named in examples/README.md, offline, with public names only."""

from __future__ import annotations

import ast
import importlib
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT
from tests.shortly import SHORTLY

FOLDER = ROOT / "examples"
EXAMPLES = sorted(path for path in FOLDER.iterdir() if path.suffix in (".py", ".sh"))
#: Those that measure nothing and train nothing: seconds.
QUICK = ("02_score_a_model.py", "03_plan_and_prune.py")


@pytest.fixture(scope="session")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One folder for all: as for a user who runs them in their order, later ones reuse what earlier ones made."""
    return tmp_path_factory.mktemp("examples")


def run(path: Path, out: Path) -> str:
    """What an example prints, in an environment where `optin-export` is this clone's."""
    commands = out / "bin"
    commands.mkdir(exist_ok=True)
    command = commands / "optin-export"
    command.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m optin_export "$@"\n', encoding="utf-8")
    command.chmod(0o755)
    environment = {**os.environ, "OUT": str(out), "PYTHONPATH": SHORTLY, "OMP_NUM_THREADS": "1"}
    environment |= {"HF_HUB_OFFLINE": "1", "PATH": f"{commands}{os.pathsep}{os.environ['PATH']}"}
    interpreter = [sys.executable] if path.suffix == ".py" else ["bash"]
    done = subprocess.run(
        [*interpreter, path], cwd=out, env=environment, capture_output=True, text=True, timeout=900, check=False
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done.stdout


@pytest.mark.parametrize("path", [path for path in EXAMPLES if path.name in QUICK], ids=lambda path: path.name)
def test_a_quick_example_runs(path: Path, out: Path) -> None:
    assert run(path, out)


@pytest.mark.slow
@pytest.mark.parametrize("path", [path for path in EXAMPLES if path.name not in QUICK], ids=lambda path: path.name)
def test_an_example_runs(path: Path, out: Path) -> None:
    assert run(path, out)


def test_examples_are_numbered_and_listed() -> None:
    names = [path.name for path in EXAMPLES]
    assert [name[:3] for name in names] == [f"{number:02d}_" for number in range(1, len(names) + 1)]
    listed = re.findall(r"^\| \[(.+?)\]\((.+?)\) \|", (FOLDER / "README.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert listed == [(name, name) for name in names]
    assert {path.name for path in FOLDER.iterdir()} - {"__pycache__", "runs"} == {*names, "README.md"}
    assert set(QUICK) <= set(names)


def test_examples_are_short() -> None:
    for path in EXAMPLES:
        lines = [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
        assert 8 <= len(lines) <= 85, path.name


def test_examples_import_public_names_only() -> None:
    for path in EXAMPLES:
        if path.suffix != ".py":
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("optin_export"):
                module = importlib.import_module(str(node.module))
                assert {alias.name for alias in node.names} <= set(module.__all__), f"{path.name}: {node.module}"
                assert str(node.module).count(".") == 1, f"{path.name} reaches into {node.module}"
