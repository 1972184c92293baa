"""Text while torch is loaded: on a terminal, before anything else, and nowhere else."""

from __future__ import annotations

import os
import pty
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.fixture
def slow_torch(tmp_path: Path) -> dict[str, str]:
    """An environment whose torch cannot be loaded: what is on the terminal until then is all that is shown."""
    (tmp_path / "torch.py").write_text("print('TORCH BEGINS', flush=True)\nraise SystemExit(7)\n", encoding="utf-8")
    path = os.pathsep.join([str(tmp_path), *sys.path])
    return {**os.environ, "PYTHONPATH": path}


def on_a_terminal(words: list[str], environment: dict[str, str]) -> str:
    main, side = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-m", "optin_export", *words], stdin=side, stdout=side, stderr=side, env=environment
    )
    os.close(side)
    found = b""
    while True:
        try:
            found += (part := os.read(main, 4096))
        except OSError:  # the other end was closed
            break
        if not part:
            break
    process.wait()
    os.close(main)
    return found.decode().replace("\r\n", "\n")


def test_a_terminal_is_told_before_torch_loads(slow_torch: dict[str, str], quick_recipe: Path) -> None:
    assert on_a_terminal([str(quick_recipe)], slow_torch).startswith("loading torch ...\nTORCH BEGINS")
    for option in ("--json", "--quiet"):
        assert "loading torch" not in on_a_terminal([str(quick_recipe), option], slow_torch)


def test_a_log_is_not(slow_torch: dict[str, str], quick_recipe: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "optin_export", str(quick_recipe)],
        capture_output=True,
        text=True,
        check=False,
        env=slow_torch,
    )
    assert done.stdout == "TORCH BEGINS\n" and "loading" not in done.stderr


@pytest.fixture
def quick_recipe(tmp_path: Path) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text(
        "recipe: 1\nname: r\nmodel: {source: 'timm:resnet18', task: image-classification}\n"
        "data: {calibration: {source: 'npz:none.npz'}}\nprune: {budget: {macs: 0.5}}\n",
        encoding="utf-8",
    )
    return path
