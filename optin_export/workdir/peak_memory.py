"""Peak memory of this process since a reset, as counted by Linux; unknown on other systems. And freed memory, given
back to the system: glibc keeps what was freed between other blocks."""

from __future__ import annotations

import ctypes
from functools import cache
from pathlib import Path
from typing import Any

_PROCESS = Path("/proc/self")


@cache
def _trim() -> Any:
    try:
        return ctypes.CDLL(None).malloc_trim
    except (OSError, AttributeError):  # not glibc
        return None


def release_freed() -> None:
    """Give freed memory back to the system, where the C library can."""
    trim = _trim()
    if trim is not None:
        trim(0)


def forget_peak() -> bool:
    """Reset the peak; False if the system cannot."""
    try:
        (_PROCESS / "clear_refs").write_text("5")
    except OSError:
        return False
    return True


def peak_bytes() -> int | None:
    """Peak resident bytes since `forget_peak`; None if the system does not report them."""
    try:
        lines = (_PROCESS / "status").read_text(encoding="utf-8").splitlines()
        return next(int(line.split()[1]) << 10 for line in lines if line.startswith("VmHWM:"))
    except (OSError, StopIteration, ValueError, IndexError):
        return None
