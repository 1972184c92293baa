"""A command that is started in a process group of its own and killed with SIGKILL, for study_kills.py."""

from __future__ import annotations

import contextlib
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from optin_export.cli import main

COMMAND = Path(__file__).resolve().parent / "short_measuring.py"
#: Where a study keeps a copy of the package and of the recipes: a step is done again when the code changes.
CODE = "code"
ROOT = COMMAND.parents[2]
#: Seconds after which a command counts as hanging.
HANGS = 600.0
#: Of a run's temporary folder: what libraries keep there, with or without a kill.
OF_LIBRARIES = ("torchinductor_", ".ses")


def freeze(place: Path) -> None:
    """Copy what the commands of a study run, for as long as it takes."""
    for name in ("optin_export", "recipes"):
        shutil.copytree(ROOT / name, place / CODE / name, ignore=shutil.ignore_patterns("__pycache__"))


def surroundings(place: Path, temporary: Path) -> dict[str, str]:
    """What is set in the environment of a command."""
    own = {"TMPDIR": str(temporary), "PYTHONPATH": str(place / CODE)}
    return {**own, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


class Victim:
    """`optin-export` with `words`. place: for its output. temporary: its folder for temporary files."""

    def __init__(self, words: Sequence[str], place: Path, temporary: Path) -> None:
        temporary.mkdir(exist_ok=True)
        self.log, self.began = place / "stderr", time.monotonic()
        self.log.write_bytes(b"")
        self.process = self.start(words, place, temporary)

    def start(self, words: Sequence[str], place: Path, temporary: Path) -> subprocess.Popen[bytes]:
        with self.log.open("wb") as errors, (place / "stdout").open("wb") as output:
            return subprocess.Popen(
                [sys.executable, str(COMMAND), *words],
                stdout=output,
                stderr=errors,
                stdin=subprocess.DEVNULL,
                env={**os.environ, **surroundings(place, temporary)},
                start_new_session=True,
            )

    def stage(self) -> str:
        """The stage of a run that is under way, by its events."""
        found = "starting"
        for line in self.log.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith('{"event": "start"') and line.endswith("}"):
                found = json.loads(line)["stage"]
        return found

    def age(self) -> float:
        """Seconds since it was started."""
        return time.monotonic() - self.began

    def until(self, happened: Callable[[], bool], pause: float = 0.002) -> bool:
        """Wait until something has happened; False if the process ends before."""
        while not happened():
            if self.process.poll() is not None:
                return False
            self._watch()
            time.sleep(pause)
        return True

    def asleep(self, seconds: float) -> bool:
        """Wait that long; False if the process ends before."""
        end = time.monotonic() + seconds
        return self.until(lambda: time.monotonic() >= end)

    def kill(self) -> bool:
        """SIGKILL to the whole group; whether the process was still alive, and so died of it."""
        try:
            os.killpg(self.process.pid, signal.SIGKILL)
        except ProcessLookupError:
            return False
        return self.process.wait(HANGS) == -signal.SIGKILL

    def end(self) -> int:
        """Let it end by itself; its exit code."""
        while self.process.poll() is None:
            self._watch()
            time.sleep(0.02)
        return self.process.returncode

    def survivors(self) -> bool:
        """Whether a process of its group is still there."""
        for _ in range(100):
            try:
                os.killpg(self.process.pid, 0)
            except ProcessLookupError:
                return False
            time.sleep(0.02)  # killed, and not yet taken away
        return True

    def traceback(self) -> bool:
        return "Traceback" in self.log.read_text(encoding="utf-8", errors="replace")

    def _watch(self) -> None:
        if self.age() > HANGS:
            self.kill()
            raise TimeoutError(f"it has not ended within {HANGS:.0f} s")


def verified(folder: Path) -> bool:
    """Whether `optin-export verify` finds everything in a folder as it was written; in this process, to be short."""
    with contextlib.redirect_stdout(io.StringIO()):
        return main(["verify", str(folder)]) == 0


def made_old(temporary: Path) -> int:
    """What killed processes left in the folder for temporary files becomes an hour old; how much that is.

    The next run deletes such folders once they are a minute old, and a user's next run comes later than the study's.
    """
    found = list(temporary.glob("optin-*"))
    for path in found:
        os.utime(path, (time.time() - 3600,) * 2)
    return len(found)


def strange(temporary: Path) -> list[str]:
    """What lies in a folder for temporary files that no library keeps there."""
    return sorted(path.name for path in temporary.iterdir() if not path.name.startswith(OF_LIBRARIES))
