#!/usr/bin/env python3
"""What a busy neighbour does to a measured speedup: the same engines alone, beside it, and alone again.

    taskset -c 0 python tools/studies/study_neighbours.py RUN ...

RUN: the folder of a finished run. Its engines are measured as a run measures them. Neighbours run on every other CPU,
one process each: they multiply matrices that stay in the cache, or copy arrays that do not. Or there is one on every
CPU, also on that of the engines, which then take turns with it. Writes
docs/measurements/studies/neighbours.json. Wants a machine that is quiet apart from that.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from study_files import inputs_of, machine, save

from optin_export.engines import load
from optin_export.measure import LatencySettings, measure_latency
from optin_export.recipe import Target, engine_name, engine_names
from optin_export.report.schema import read_report

NAME = "neighbours"
#: What a neighbour does -> its program.
NEIGHBOURS = {
    "computes": "import numpy as np\nx = np.ones((256, 256), np.float32)\nwhile True: x @ x",
    "copies": "import numpy as np\nx = np.ones(2**27, np.float32)\ny = x.copy()\nwhile True: y[:] = x",
}
NEIGHBOURS["shares the CPU"] = NEIGHBOURS["computes"]
ORDER = ("", "computes", "copies", "shares the CPU", "")


@contextlib.contextmanager
def neighbours(kind: str) -> Iterator[None]:
    """A process that does this on every CPU but the first, or on all; none where there is nothing to do."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    found = []
    first = 0 if kind.startswith("shares") else 1
    for cpu in range(first, (os.cpu_count() or 1) if kind else first):
        command = ["taskset", "-c", str(cpu), sys.executable, "-c", NEIGHBOURS[kind]]
        found.append(subprocess.Popen(command, env=environment))
    try:
        time.sleep(2.0 if found else 0.0)
        yield
    finally:
        for process in found:
            process.kill()
            process.wait()


def measured(folder: Path, batches: list[int]) -> Iterator[dict[str, Any]]:
    """One row for every batch size and neighbour."""
    report, target = read_report(folder), Target()
    inputs = inputs_of(folder)
    place = folder / "engines" / target.name
    engines = {name: partial(load, place / f"{name}.onnx", target) for name in engine_names(report.precision)}
    base, pruned = (engine_name(model, report.precision) for model in ("base", "pruned"))
    for batch in batches:
        for kind in ORDER:
            with neighbours(kind):
                found = measure_latency(
                    engines[base],
                    engines[pruned],
                    {name: values[:batch] for name, values in inputs.items()},
                    LatencySettings(target.name, batch, None, 0, precision=report.precision),
                    plain={name: engines[name] for name in ("base", "pruned")},
                )
            assert found.neighbours is not None
            whole = next((one.speedup for one in found.comparisons if one.against == "base"), found.speedup)
            yield {
                "run": report.name,
                "macs": round(report.macs.ratio, 4),
                "precision": report.precision,
                "batch": batch,
                "neighbour": kind,
                "seen": asdict(found.neighbours),
                "base_ms": found.engines_ms["base"].p50,
                "pruned_ms": found.pruned_ms.p50,
                "speedup": asdict(whole),
                "noise_floor": found.noise_floor,
            }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8])
    args = parser.parse_args()
    rows: list[dict[str, Any]] = []
    for folder in args.runs:
        for row in measured(folder, args.batches):
            rows.append(row)
            print(json.dumps(row), flush=True)
    save(NAME, {"cpus": os.cpu_count(), **machine("onnxruntime"), "rows": rows})


if __name__ == "__main__":
    main()
