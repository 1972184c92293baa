"""One process at a time in a run folder: refused by name, or waited for; the kernel gives the lock back."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

import optin_export
from optin_export import cli
from optin_export.errors import EnvironmentLacks
from optin_export.workdir.lock import LOCK, held

HOLDER = """
import sys, time
from pathlib import Path
from optin_export.workdir.lock import held
with held(Path(sys.argv[1]), 'a run'):
    print('held', flush=True)
    time.sleep(float(sys.argv[2]))
"""


def holder(folder: Path, seconds: float) -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(folder), str(seconds)], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None and process.stdout.readline() == "held\n"
    return process


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "recipe.yaml").write_text("recipe: 1")
    return tmp_path / "run"


def test_the_second_is_told_who_holds_it(folder: Path, vit_recipe: Any, capsys: pytest.CaptureFixture[str]) -> None:
    process = holder(folder, 60)
    try:
        with pytest.raises(EnvironmentLacks, match="in use") as caught:
            optin_export.run(vit_recipe(), folder, stop_after="sources")
        assert f"a run (process {process.pid} on " in caught.value.why
        for words in (["measure", str(folder)], ["ship", str(folder), "--to", str(folder.parent / "m")]):
            assert cli.main(words) == 5
            assert f"process {process.pid}" in capsys.readouterr().err
        assert (folder / "recipe.yaml").read_text() == "recipe: 1"
    finally:
        process.kill()
        process.wait()
    with held(folder, "another"):  # a killed holder holds nothing
        pass


def test_waiting(folder: Path) -> None:
    process = holder(folder, 0.5)
    with held(folder, "another", wait=True):
        assert process.wait() == 0


def test_a_stopped_holder_still_holds(folder: Path) -> None:
    process = holder(folder, 60)
    try:
        os.kill(process.pid, signal.SIGSTOP)
        with pytest.raises(EnvironmentLacks), held(folder, "another"):
            pass
    finally:
        process.kill()
        process.wait()


def test_nothing_is_left_of_a_run_that_was_refused(tmp_path: Path) -> None:
    with held(tmp_path / "run", "a run"):
        assert (tmp_path / "run" / LOCK).exists()
    assert not (tmp_path / "run").exists()
    (tmp_path / "empty").mkdir()
    with held(tmp_path / "empty", "a run"):
        pass
    assert list((tmp_path / "empty").iterdir()) == []


def test_many_that_wait_hold_it_one_after_the_other(tmp_path: Path) -> None:
    """Each takes the lock file away again, so that the next one finds another file than it opened."""
    folder, log = tmp_path / "run", tmp_path / "log"
    code = (
        "import sys, time\nfrom pathlib import Path\nfrom optin_export.workdir.lock import held\n"
        "for _ in range(20):\n"
        "    with held(Path(sys.argv[1]), 'a run', wait=True):\n"
        "        with open(sys.argv[2], 'a') as log:\n"
        "            log.write('in\\n'); log.flush(); time.sleep(0.001); log.write('out\\n')\n"
    )
    started = [subprocess.Popen([sys.executable, "-c", code, str(folder), str(log)]) for _ in range(4)]
    assert [process.wait() for process in started] == [0] * 4
    assert log.read_text().split() == ["in", "out"] * 80


def test_a_lock_file_that_is_a_link_is_not_followed(folder: Path) -> None:
    (folder / LOCK).parent.mkdir()
    target = folder.parent / "precious"
    target.write_text("kept")
    (folder / LOCK).symlink_to(target)
    with held(folder, "a run"):
        time.sleep(0)
    assert target.read_text() == "kept"
