"""The costs of a run's stages when they were last executed, for `--dry-run`; the report does not have them if a stage
is reused later."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

from optin_export.errors import EnvironmentLacks
from optin_export.workdir.files import read_json, write_json

NAME = ".stages/seconds.json"


def remember(run: Path, stage: str, seconds: float, peak_bytes: int | None) -> None:
    """Record the time of a stage, and the peak memory of the process in it. Never makes a run fail."""
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
        return {}  # no run yet, or a foreign file
