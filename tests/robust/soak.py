"""Whole runs, one after the other in one process, each in a new folder; prints what the process holds after each."""

from __future__ import annotations

import gc
import json
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

import psutil

import optin_export
from tests.robust import forked
from tests.shortly import measure_shortly


def held() -> dict[str, Any]:
    """Bytes in memory, threads, open files and temporary folders of this process."""
    gc.collect()
    process = psutil.Process()
    return {
        "rss": process.memory_info().rss,
        "threads": process.num_threads(),
        "files": process.num_fds(),
        "temporary": sorted(path.name for path in Path(tempfile.gettempdir()).iterdir()),
    }


def main(count: int, folder: Path) -> None:
    recipe = forked.write_recipe(folder)
    measure_shortly()
    told = []
    for _ in range(count):
        report = optin_export.run(recipe, folder / "run")
        assert report is not None and report.verdict.passed
        shutil.rmtree(folder / "run")
        told.append(held())
    print(json.dumps(told))


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]))
