"""Killed at any moment, a run goes on with the same command and ends as one that was never disturbed."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from optin_export.errors import InputError
from optin_export.workdir.files import sha256_file
from optin_export.workdir.run_directory import STAGES, leftovers
from tests.robust import forked
from tests.shortly import SHORTLY

pytest.importorskip("onnxruntime")
pytest.importorskip("tritonclient.grpc")
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": SHORTLY}


def killed(kills: int, seed: int, seconds: int) -> dict[str, Any]:
    """See `forked.kill_many`; every kill is a SIGKILL of a process that was within the stage it counts for."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.robust.forked", str(kills), str(seed)],
        cwd=Path(__file__).parents[2],
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=seconds,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    told: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    print(f"\n{told['kills']} kills: {told['hit']}; {told['left_and_cleared']} leftovers cleared", file=sys.__stdout__)
    return told


@pytest.mark.slow
def test_fifty_kills_end_as_an_undisturbed_run() -> None:
    told = killed(50, 7, 900)
    assert told["kills"] >= 50
    assert set(told["hit"]) == set(STAGES) and all(told["hit"].values()), told["hit"]


@pytest.mark.slow
def test_the_real_command_is_killed(tmp_path: Path) -> None:
    """The same with `optin-export` itself, by its events: in export, in measure, and as it starts."""
    recipe, generator = forked.write_recipe(tmp_path), random.Random(3)
    whole = command(recipe, tmp_path / "whole")
    assert whole.wait(600) == 0
    out = tmp_path / "killed"
    for stage in ("sources", "export", "measure"):
        process = command(recipe, out)
        assert process.stderr is not None
        for line in process.stderr:
            if line.startswith("{") and json.loads(line).get("stage") == stage:
                break
        try:
            process.wait(generator.uniform(0, 0.2))
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
        assert process.wait(600) == -signal.SIGKILL
    assert command(recipe, out).wait(600) == 0
    for name in ("plan/plan.json", "onnx/pruned.onnx"):
        assert sha256_file(out / name) == sha256_file(tmp_path / "whole" / name)
    assert leftovers(out) == []


def command(recipe: Path, out: Path) -> subprocess.Popen[str]:
    words = ["optin_export", str(recipe), "--out", str(out), "--json"]
    return subprocess.Popen(
        [sys.executable, "-m", *words],
        cwd=Path(__file__).parents[2],
        env=ENVIRONMENT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_what_a_killed_run_left_is_cleared_by_the_next(tmp_path: Path, vit_recipe: Any) -> None:
    import optin_export

    run = tmp_path / "run"
    optin_export.run(vit_recipe(), run, stop_after="sources")
    outside = tmp_path / "outside"
    outside.mkdir()
    kept = [outside / ".tmp-of-somebody.json", run / "recipe.yaml"]
    kept[0].write_text("kept")
    (run / "link").symlink_to(outside, target_is_directory=True)
    for name in (".tmp-abc.json", "onnx/.tmp-abc.onnx", "plan/.trials/base.onnx", ".triton.optin-export/staging-1/a"):
        (run / name).parent.mkdir(parents=True, exist_ok=True)
        (run / name).write_text("half")
    assert len(leftovers(run)) == 4
    optin_export.run(vit_recipe(), run, stop_after="sources")
    assert leftovers(run) == [] and all(path.exists() for path in kept)


@pytest.mark.parametrize("stranger", ["notes.yaml", ".tmp-notes.yaml"])
def test_a_run_that_was_killed_while_it_wrote_its_recipe(tmp_path: Path, vit_recipe: Any, stranger: str) -> None:
    """The folder is no run yet, and what is half-written in it is ours; a file of somebody else's is not."""
    import optin_export

    run = tmp_path / "run"
    (run / ".stages").mkdir(parents=True)
    (run / ".tmp-0123456789abcdef.yaml").write_text("half")
    optin_export.run(vit_recipe(), run, stop_after="sources")
    assert sorted(path.name for path in run.iterdir()) == [".stages", "recipe.yaml"]
    other = tmp_path / "other"
    other.mkdir()
    (other / stranger).write_text("kept")
    with pytest.raises(InputError, match="not a run folder"):
        optin_export.run(vit_recipe(), other, stop_after="sources")
    assert (other / stranger).read_text() == "kept"


def test_what_safetensors_was_writing_is_cleared(tmp_path: Path) -> None:
    """It writes into a file of its own beside the one that it is told, under the name that this test waits for."""
    ready, outside = tmp_path / "scores" / ".tmp-ours.safetensors", tmp_path / "scores" / "scores.safetensors"
    ready.parent.mkdir()
    code = (
        "import sys, numpy\nfrom safetensors.numpy import save_file\n"
        "save_file({'a': numpy.zeros(1 << 24)}, sys.argv[1])"
    )
    process = subprocess.Popen([sys.executable, "-c", code, str(ready)])
    while process.poll() is None and len(list(ready.parent.glob(".tmp*"))) == 0:
        pass
    process.kill()
    process.wait()
    outside.write_bytes(b"whole")
    found = {path.name for path in tmp_path.rglob("*") if path.is_file()} - {outside.name}
    assert found and {path.name for path in leftovers(tmp_path)} == found


def test_a_sweep_leaves_what_its_runs_are_writing(tmp_path: Path) -> None:
    """Somebody may be at work in one of them: each run clears its own."""
    for name in (".tmp-abc.json", ".shared/key/.tmp-abc.json", "recipe.yaml", "one/recipe.yaml", "one/.tmp-abc.json"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("half")
    found = sorted(path.relative_to(tmp_path).as_posix() for path in leftovers(tmp_path))
    assert found == [".shared/key/.tmp-abc.json", ".tmp-abc.json"]
