"""What else ran on the machine while something was timed."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from optin_export.measure import neighbours
from optin_export.measure.neighbours import BUSY, Neighbours, Watch


def readings(monkeypatch: pytest.MonkeyPatch, *of: tuple[float, ...] | None) -> None:
    """(seconds, used, stolen, used by this process) of four CPUs, one after another."""
    left = list(of)
    monkeypatch.setattr(neighbours, "_read", lambda: left.pop(0))
    monkeypatch.setattr(neighbours.os, "cpu_count", lambda: 4)


def test_others_are_what_was_used_without_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    readings(monkeypatch, (5.0, 500.0, 7.0, 100.0), (15.0, 522.0, 9.0, 109.0))
    assert Watch().seen() == Neighbours(others=pytest.approx(13 / 40), stolen=pytest.approx(2 / 40))


def test_an_idle_machine_is_not_busy_and_nothing_is_less_than_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    readings(monkeypatch, (5.0, 500.0, 7.0, 100.0), (15.0, 510.0, 7.0, 110.1))
    seen = Watch().seen()
    assert seen == Neighbours(others=0.0, stolen=0.0) and not seen.busy
    assert Neighbours(others=BUSY, stolen=0.01).busy


@pytest.mark.parametrize("other", [None, (5.0, 500.0, 7.0, 100.0)])
def test_without_time_or_counts_there_is_none(monkeypatch: pytest.MonkeyPatch, other: tuple[float, ...] | None) -> None:
    readings(monkeypatch, (5.0, 500.0, 7.0, 100.0), other)
    assert Watch().seen() is None


def test_the_kernels_counts_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(psutil, "PROCFS_PATH", str(tmp_path))
    second = os.sysconf("SC_CLK_TCK")
    order = (5, 1, 2, 100, 50, 0.5, 0.25, 3)  # user, nice, system, idle, iowait, irq, softirq, steal
    words = " ".join(str(round(one * second)) for one in order)
    (tmp_path / "stat").write_text(f"cpu  {words} 0 0\ncpu0 1 2 3 4 5 6 7 8 0 0\n")
    found = neighbours._read()
    assert found is not None and found[1:3] == (8.75, 3.0) and found[3] > 0
    for content in ("", "cpu 1 2\n", "cpu a b c d e f g h\n"):
        (tmp_path / "stat").write_text(content)
        assert neighbours._read() is None
    (tmp_path / "stat").unlink()
    assert neighbours._read() is None


@pytest.mark.skipif(not Path("/proc/stat").exists(), reason="only Linux counts it")
def test_a_real_neighbour_is_seen() -> None:
    """One process more: at least most of one CPU more than what ran already, whatever that is."""
    spin = "import time\nend = time.monotonic() + 20\nwhile time.monotonic() < end: pass"
    other = subprocess.Popen([sys.executable, "-c", spin])
    try:
        time.sleep(0.5)
        watch = Watch()
        time.sleep(1.5)
        seen = watch.seen()
    finally:
        other.kill()
        other.wait()
    assert seen is not None and seen.others + seen.stolen > 0.4 / (os.cpu_count() or 1)
