"""Complete runs one after the other in one process, and what that holds after each:
`python tools/studies/study_soak.py`.

Every run is made by `optin_export.cli.app.main` in a new folder, as the command line would: the quickstart with a tiny
model and short measurements (short_measuring.py), then `ship` into a new repository, `verify` of both, `check`,
and `compare`, which writes a page. Then all of it is deleted, and after a garbage collection is counted what is left:
memory as it is and after `malloc_trim`, open files, threads, child processes, temporary files, and entries of the
package's module-level caches and containers. Growth is told from the end of the warm-up to the last run. One core,
about five minutes.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import gc
import io
import json
import os
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from short_measuring import SETTINGS, SHORT, command, settings

from optin_export.environment import describe
from optin_export.workdir.files import write_json

ROOT = Path(__file__).resolve().parents[2]
RECIPE = ROOT / "recipes" / "quickstart.yaml"
RESULT = ROOT / "docs" / "measurements" / "studies" / "soak.json"
#: A tiny model with random weights: what a process holds is counted, not how good a model is.
TINY = (
    "model.weights=random",
    "model.args={img_size: 32, patch_size: 8, in_chans: 1, num_classes: 10, embed_dim: 32, depth: 2, num_heads: 2}",
    "gates.accuracy_drop=null",
)
#: Growth that is still none, as a share.
TARGET = 0.05
COUNTED = ("rss_mib", "rss_trimmed_mib", "open_files", "threads", "children", "temporary", "cache_entries", "objects")


def commands(place: Path) -> list[list[str]]:
    run, models = place / "run", place / "models"
    return [
        [str(RECIPE), "--out", str(run), *settings(*TINY), "--quiet"],
        ["ship", str(run), "--to", str(models)],
        ["verify", str(run)],
        ["verify", str(models)],
        ["check", str(run)],
        ["compare", str(run), str(place / "copy"), "--out", str(place / "compare.html")],
    ]


def complete(place: Path) -> None:
    """One run and what follows it; every command has to end well, and nothing of it stays."""
    place.mkdir()
    for words in commands(place):
        said = io.StringIO()
        if words[0] == "compare":
            shutil.copytree(place / "run", place / "copy")
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            code = command(words)
        if code != 0:
            raise SystemExit(f"{' '.join(words)}: exit code {code}\n{said.getvalue()}")
    shutil.rmtree(place)


def held() -> dict[str, Any]:
    """What this process holds, see COUNTED."""
    gc.collect()
    before = _resident()
    with contextlib.suppress(OSError, AttributeError):  # only glibc has it
        ctypes.CDLL(None).malloc_trim(0)
    return {
        "rss_mib": before,
        "rss_trimmed_mib": _resident(),
        "open_files": len(list(Path("/proc/self/fd").iterdir())),
        "threads": len(list(Path("/proc/self/task").iterdir())),
        "children": sum(len((task / "children").read_text().split()) for task in Path("/proc/self/task").iterdir()),
        "temporary": sum(1 for _ in Path(tempfile.gettempdir()).rglob("*")),
        "cache_entries": sum(caches().values()),
        "objects": len(gc.get_objects()),
    }


def caches() -> dict[str, int]:
    """{module.name: entries} of the caches of functions, and of the containers, that modules of the package hold."""
    found = {}
    for module in [one for name, one in sys.modules.items() if name.partition(".")[0] == "optin_export"]:
        for name, value in vars(module).items():
            if hasattr(value, "cache_info") and value.__module__ == module.__name__:
                found[f"{module.__name__}.{name}"] = value.cache_info().currsize
            elif isinstance(value, dict | list | set) and not name.startswith("__"):
                found[f"{module.__name__}.{name}"] = len(value)
    return found


def growth(series: list[dict[str, Any]], warm_up: int) -> dict[str, Any]:
    """Of every count: after the warm-up, at the end, and by which share it has grown in between."""
    first, last = series[warm_up - 1], series[-1]
    return {
        name: {
            "first": first[name],
            "last": last[name],
            "growth": round((last[name] - first[name]) / max(first[name], 1), 4),
        }
        for name in COUNTED
    }


def _resident() -> float:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return round(pages * os.sysconf("SC_PAGE_SIZE") / 2**20, 1)


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--runs", type=int, default=30)
    parser.add_argument("--warm-up", type=int, default=5)
    parser.add_argument("--out", type=Path, default=RESULT)
    options = parser.parse_args(arguments)
    series: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(prefix="study-soak-") as name:
        place = Path(name)
        (place / "temporary").mkdir()
        tempfile.tempdir = os.environ["TMPDIR"] = str(place / "temporary")
        for index in range(options.runs):
            began = time.monotonic()
            complete(place / f"{index:03}")
            if index == options.warm_up - 1:
                known = caches()
            series.append({"seconds": round(time.monotonic() - began, 1), **held()})
            print(json.dumps(series[-1]), flush=True)
        left = sorted(path.relative_to(place).as_posix() for path in place.rglob("*"))
    found = growth(series, options.warm_up)
    grown = {name: count - known.get(name, 0) for name, count in caches().items() if count > known.get(name, 0)}
    write_json(
        options.out,
        {
            "recipe": "quickstart",
            "settings": [*SETTINGS, *TINY],
            "measuring": SHORT,
            "commands": [words[0] if index else "run" for index, words in enumerate(commands(Path()))],
            "runs": options.runs,
            "warm_up": options.warm_up,
            "target": TARGET,
            "growth": found,
            "grown_caches": grown,
            "temporary": left,
            "series": series,
            "environment": describe(),
        },
    )
    print(json.dumps({"growth": found, "caches": grown, "temporary": left}, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
