"""What the stages of a run took when they were last carried out, for `--dry-run`: a stage that is reused later takes no
time and would hide it in the report."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

from optin_export.errors import EnvironmentLacks
from optin_export.workdir.files import read_json, write_json

NAME = ".stages/seconds.json"


def remember(run: Path, stage: str, seconds: float, peak_bytes: int | None) -> None:
    """Note what a stage took, and the most memory that the process held in it. A run never fails by it."""
    with contextlib.suppress(EnvironmentLacks, ValueError):
        write_json(run / NAME, {**recall(run), stage: {"seconds": round(seconds, 3), "peak_bytes": peak_bytes}})


def recall(run: Path) -> dict[str, dict[str, Any]]:
    """Stage -> {"seconds", "peak_bytes"}, as far as known."""
    try:
        found = read_json(run / NAME)
        return {
            stage: entry
            for stage, entry in found.items()
            if isinstance(entry["seconds"], int | float) and isinstance(entry["peak_bytes"], int | None)
        }
    except (OSError, ValueError, AttributeError, TypeError, KeyError):
        return {}  # no run yet, or a file that is not ours
