"""The checks on a second device, in a process of their own: torch counts devices when the first backward pass runs."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

CHECKS = Path(__file__).with_name("work_device_checks.py")


@pytest.mark.slow
def test_everything_is_computed_on_another_device() -> None:
    words = ["-m", "pytest", "-q", "-n", "0", "-m", "", "-p", "no:cacheprovider", str(CHECKS)]
    done = subprocess.run([sys.executable, *words], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-3000:]
