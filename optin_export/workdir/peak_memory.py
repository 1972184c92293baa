"""The most memory this process held since a moment, by Linux's own count; elsewhere unknown."""

from __future__ import annotations

from pathlib import Path

_PROCESS = Path("/proc/self")


def forget_peak() -> bool:
    """Start counting again; False where the system cannot."""
    try:
        (_PROCESS / "clear_refs").write_text("5")
    except OSError:
        return False
    return True


def peak_bytes() -> int | None:
    """Resident bytes at most since `forget_peak`; None where the system does not say."""
    try:
        lines = (_PROCESS / "status").read_text(encoding="utf-8").splitlines()
        return next(int(line.split()[1]) << 10 for line in lines if line.startswith("VmHWM:"))
    except (OSError, StopIteration, ValueError, IndexError):
        return None
