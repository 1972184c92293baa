"""Whole runs, one after the other in one process, each in a new folder; prints what the process holds after each."""

from __future__ import annotations

import gc
import json
import os
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

import optin_export
from tests.robust import forked
from tests.shortly import measure_shortly


def held() -> dict[str, Any]:
    """Bytes in memory, threads, open files and temporary folders of this process."""
    gc.collect()
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return {
        "rss": pages * os.sysconf("SC_PAGE_SIZE"),
        "threads": len(list(Path("/proc/self/task").iterdir())),
        "files": len(list(Path("/proc/self/fd").iterdir())),
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
