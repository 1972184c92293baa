"""Which architectures can be pruned at all: `python tools/studies/breadth.py [NAMES]` runs the command on each.

The architectures (breadth_text.py, breadth_images.py, breadth_python.py) are those that users bring: tiny, with random
weights, so that a run takes seconds. Each is run in a forked child with a time limit. A result is checked without the
package's own checks (breadth_check.py): whether the graphs compute what the original model and `load_model` compute,
at other batch sizes and lengths. If 60 % of the MACs cannot be reached, the budget is (1 + floor) / 2.

`--quick` ends each run after the check of the units. Rows that the file holds are skipped, unless they are named, or
quick while the command is complete. One core, hours; quick: minutes.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import json
import os
import signal
import sys
import tempfile
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import breadth_images
import breadth_python
import breadth_run
import breadth_text
import psutil
import torch
from breadth_build import Case
from render_breadth import described

from optin_export.environment import describe
from optin_export.workdir.files import write_json

ROOT = Path(__file__).resolve().parents[2]
RESULT = ROOT / "docs" / "measurements" / "studies" / "breadth.json"
CASES: dict[str, Case] = {**breadth_text.CASES, **breadth_images.CASES, **breadth_python.CASES}
#: Imported before the first fork, so that no child spends seconds on it.
EARLY = (
    *(f"optin_export.{name}" for name in ("stages.pipeline", "report", "export.program", "pruning.checkpoint")),
    *("timm", "torchvision", "transformers", "onnx", "onnxscript", "onnxruntime", "torch_pruning", "scipy.optimize"),
    *("torch.onnx", "torch._dynamo", "torch.onnx._internal.exporter._core"),
)
#: CPU seconds after which a run is killed, and how much longer it may take by the clock, on a busy machine.
LIMIT, QUICK_LIMIT, BUSY = 300.0, 60.0, 5.0


@dataclass(frozen=True)
class Child:
    """A run in a process of its own. written: where it puts its row."""

    name: str
    pid: int
    began: float
    written: Path


def start(name: str, place: Path, data: Path, quick: bool) -> Child:
    """Fork a child that measures one architecture, its output in a log file."""
    written, began = place / f"{name}.json", time.monotonic()
    pid = os.fork()
    if pid:
        return Child(name, pid, began, written)
    code = 1
    try:
        os.setsid()
        log = os.open(place / f"{name}.log", os.O_CREAT | os.O_WRONLY | os.O_TRUNC)
        os.dup2(log, 1)
        os.dup2(log, 2)
        torch.set_num_threads(1)
        row = breadth_run.measure(name, CASES[name], place / name, data, quick)
        written.write_text(json.dumps(row), encoding="utf-8")
        code = 0
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def ended(child: Child, limit: float) -> dict[str, Any] | None:
    """The row of a child that has ended, or that took too long and is killed; None while it runs."""
    passed, used, late = time.monotonic() - child.began, 0.0, False
    with contextlib.suppress(psutil.NoSuchProcess):  # it has ended
        used = sum(psutil.Process(child.pid).cpu_times()[:2])
        late = used > limit or passed > BUSY * limit
    pid, status = os.waitpid(child.pid, os.WNOHANG)
    if not pid and not late:
        return None
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child.pid, signal.SIGKILL)
    if not pid:
        os.waitpid(child.pid, 0)
    if child.written.is_file():
        row: dict[str, Any] = json.loads(child.written.read_text(encoding="utf-8"))
        return row
    case = CASES[child.name]
    slow = (
        f"more than {limit:.0f} s of CPU time" if used > limit else f"more than {BUSY * limit:.0f} s on a busy machine"
    )
    died = slow if late else f"the process died ({os.waitstatus_to_exitcode(status)})"
    facts = {"library": case.library, "task": case.task, "attention": case.attention}
    return {**facts, "code": None, "reason": died, "seconds": round(used, 1)}


def wanted(names: list[str], rows: dict[str, Any], quick: bool) -> list[str]:
    """Named architectures, or those without a row or not built; in a complete run also those with a quick row."""
    unknown = sorted(set(names) - set(CASES))
    if unknown:
        raise SystemExit(f"no such architecture: {', '.join(unknown)}")
    return names or [name for name in CASES if not _is_complete(rows.get(name, {}), quick)]


def _is_complete(row: dict[str, Any], quick: bool) -> bool:
    return "code" in row and (quick or not row.get("quick"))


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help="architectures; default: all without a row")
    parser.add_argument("--quick", action="store_true", help="end each run after the check of the units")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time")
    parser.add_argument("--limit", type=float, help=f"CPU seconds per run ({LIMIT:.0f}; quick: {QUICK_LIMIT:.0f})")
    parser.add_argument("--list", action="store_true", help="print the names")
    parser.add_argument("--out", type=Path, default=RESULT)
    options = parser.parse_args(arguments)
    if options.list:
        print("\n".join(CASES))
        return 0
    os.environ.update(HF_HUB_OFFLINE="1", OMP_NUM_THREADS="1", TRANSFORMERS_VERBOSITY="error")
    rows = json.loads(options.out.read_text(encoding="utf-8"))["rows"] if options.out.is_file() else {}
    waiting = wanted(options.names, rows, options.quick)
    for name in EARLY:
        importlib.import_module(name)
    limit = options.limit or (QUICK_LIMIT if options.quick else LIMIT)
    with tempfile.TemporaryDirectory(prefix="breadth-") as folder:
        place = Path(folder)
        breadth_run.write_data(place / "data")
        measured = partial(start, place=place, data=place / "data", quick=options.quick)
        running: list[Child] = []
        while waiting or running:
            while waiting and len(running) < options.jobs:
                running.append(measured(waiting.pop(0)))
            for child in list(running):
                row = ended(child, limit)
                if row is None:
                    continue
                running.remove(child)
                rows[child.name] = row
                ordered = {name: rows[name] for name in CASES if name in rows}
                facts = {"budget": breadth_run.BUDGET, "environment": describe()}
                write_json(options.out, {**facts, "rows": ordered})
                print(child.name, described(row), flush=True)
            time.sleep(0.1)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
