"""The lock of one machine: whoever measures is alone, whoever computes is not."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from pathlib import Path
from typing import Any

from optin_export.workdir.measurement_lock import Machine


def hold(folder: Path, how: str, said: Any, seconds: float) -> None:
    with getattr(Machine(folder), how)():
        said.put((how, "in", time.monotonic()))
        time.sleep(seconds)
        said.put((how, "out", time.monotonic()))


def started(folder: Path, how: str, said: Any, seconds: float) -> Any:
    process = multiprocessing.get_context("fork").Process(target=hold, args=(folder, how, said, seconds))
    process.start()
    return process


def test_nothing_runs_beside_a_measurement(tmp_path: Path) -> None:
    said = multiprocessing.get_context("fork").Queue()
    processes = [started(tmp_path, how, said, 0.3) for how in ("busy", "busy", "quiet", "quiet", "busy")]
    events = sorted((said.get(timeout=60) for _ in range(10)), key=lambda event: event[2])
    for process in processes:
        process.join()
    inside = {"busy": 0, "quiet": 0}
    for how, what, _ in events:
        inside[how] += 1 if what == "in" else -1
        assert inside["quiet"] == 0 or (inside["quiet"] == 1 and inside["busy"] == 0), events


def test_a_killed_process_frees_the_machine(tmp_path: Path) -> None:
    said = multiprocessing.get_context("fork").Queue()
    process = started(tmp_path, "quiet", said, 600)
    said.get(timeout=60)
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    with Machine(tmp_path).busy():
        pass


def test_an_interrupt_ends_a_wait(tmp_path: Path) -> None:
    said = multiprocessing.get_context("fork").Queue()
    measuring = started(tmp_path, "quiet", said, 600)
    said.get(timeout=60)
    waiting = started(tmp_path, "busy", said, 0)
    try:
        time.sleep(0.5)
        assert waiting.is_alive()
        os.kill(waiting.pid, signal.SIGINT)
        waiting.join(30)
        assert waiting.exitcode is not None and said.empty()
    finally:
        for process in (measuring, waiting):
            process.kill()
            process.join()


def test_who_computes_may_measure_and_go_on(tmp_path: Path) -> None:
    machine = Machine(tmp_path)
    with machine.busy():
        with machine.quiet():
            assert machine.held is not None
        assert machine.held is not None
        with Machine(tmp_path).busy():  # others may compute again
            pass
    assert machine.held is None
