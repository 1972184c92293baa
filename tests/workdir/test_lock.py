"""One process at a time in a run folder: refused by name, or waited for; the kernel gives the lock back."""

from __future__ import annotations

import errno
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
from optin_export.errors import EnvironmentLacks, InputError
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


def test_a_link_put_there_while_the_lock_is_made_is_not_followed(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The folder of the lock is exchanged for a link just before the lock file is opened."""
    place, outside, plain = (folder / LOCK).parent, folder.parent / "outside", os.open
    place.mkdir()
    outside.mkdir()

    def exchanged(path: Any, *args: Any, **options: Any) -> int:
        if Path(path).name == Path(LOCK).name and not place.is_symlink():
            place.rename(folder / "moved")
            place.symlink_to(outside)
        return plain(path, *args, **options)

    monkeypatch.setattr(os, "open", exchanged)
    with pytest.raises(InputError, match="link"), held(folder, "a run"):
        pass
    assert list(outside.iterdir()) == []


def test_who_may_only_read_the_folder_is_held_off_all_the_same(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As another user, to whom the lock file opens for reading alone."""
    process, plain = holder(folder, 60), os.open

    def denied(path: Any, flags: int, *args: Any, **options: Any) -> int:
        if flags & (os.O_RDWR | os.O_CREAT):
            raise PermissionError(errno.EACCES, "Permission denied")
        return plain(path, flags, *args, **options)

    monkeypatch.setattr(os, "open", denied)
    try:
        with pytest.raises(EnvironmentLacks, match="in use") as caught, held(folder, "another"):
            pass
        assert f"process {process.pid}" in caught.value.why
    finally:
        process.kill()
        process.wait()
    with held(folder, "another"):
        pass
