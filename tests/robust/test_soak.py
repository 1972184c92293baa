"""Thirty runs in one process: memory, threads, open files and temporary folders stay as they are."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.robust.test_resume import ENVIRONMENT

pytest.importorskip("onnxruntime")


@pytest.mark.slow
def test_thirty_runs_in_one_process(tmp_path: Path) -> None:
    (tmp_path / "temporary").mkdir()
    done = subprocess.run(
        [sys.executable, "-m", "tests.robust.soak", "30", str(tmp_path)],
        cwd=Path(__file__).parents[2],
        # glibc keeps one heap per thread that ever was; one is enough to see what we keep.
        env={**ENVIRONMENT, "TMPDIR": str(tmp_path / "temporary"), "MALLOC_ARENA_MAX": "1"},
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    told = json.loads(done.stdout.splitlines()[-1])
    print(f"\nMiB after each run: {[round(one['rss'] / 2**20) for one in told]}", file=sys.__stdout__)
    warm, last = told[9], told[-1]  # caches of the libraries are full by then
    assert last["rss"] < 1.05 * warm["rss"], (warm, last)
    assert last["threads"] <= warm["threads"] and last["files"] <= warm["files"], (warm, last)
    # Libraries keep a folder each for the process (torch's compiler caches); nothing of ours stays, nothing adds up.
    assert last["temporary"] == warm["temporary"]
    assert not [name for name in last["temporary"] if name.startswith(("optin", "tmp"))]
