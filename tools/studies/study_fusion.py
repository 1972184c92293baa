#!/usr/bin/env python3
"""What onnxruntime's SkipLayerNormFusion costs or saves on this CPU: engines with and without it, interleaved.

    python tools/studies/study_fusion.py RUN

RUN: the folder of a finished run; every graph in its onnx/ is built twice for one thread. All engines take turns in the
same blocks, as a run's own measurement does it. Writes docs/measurements/studies/fusion.json, one row per graph and
batch. Wants a quiet machine.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from dataclasses import asdict
from pathlib import Path
from unittest import mock

import numpy as np
from safetensors.numpy import load_file

from optin_export.engines import onnxruntime as backend
from optin_export.environment import describe
from optin_export.measure import Interleaved, interleaved
from optin_export.measure.latency import ratio_of_medians
from optin_export.measure.rounds import Speedup
from optin_export.recipe import Target
from optin_export.report.schema import read_report

RESULT = Path(__file__).resolve().parents[2] / "docs" / "measurements" / "studies" / "fusion.json"
BLOCKS = 40


def speedup_of(found: Interleaved, name: str, against: str) -> Speedup:
    """How many times faster `name` is, with the interval over blocks."""
    return ratio_of_medians(found.samples[against], found.samples[name], np.random.default_rng(found.seed))


def inputs_of(run: Path) -> dict[str, np.ndarray]:
    """The real rows at the shipped shape that a run keeps."""
    stored = load_file(run / "measure" / "reference.safetensors")
    return {name.removeprefix("input."): rows for name, rows in stored.items() if name.startswith("input.")}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8])
    args = parser.parse_args()
    report, target = read_report(args.run), Target()
    inputs = inputs_of(args.run)
    rows = []
    with tempfile.TemporaryDirectory(prefix="study-fusion-") as folder:
        engines = {}
        graphs = sorted((args.run / "onnx").glob("*.onnx"))
        for graph in graphs:
            for name, left_out in ((f"{graph.stem} fused", ()), (graph.stem, backend._SLOWER)):
                path = Path(folder) / f"{name}.onnx"
                with mock.patch.object(backend, "_SLOWER", left_out):
                    backend.build(graph, target, path, [])
                engines[name] = backend.load(path, target)
        for batch in args.batches:
            some = {name: values[:batch] for name, values in inputs.items()}
            found = interleaved.interleave(engines, some, blocks=BLOCKS, seed=0)
            for name in (graph.stem for graph in graphs):
                fused = f"{name} fused"
                speedup = asdict(speedup_of(found, name, fused))
                ms, fused_ms = found.median(name).median, found.median(fused).median
                rows.append({"graph": name, "batch": batch, "ms": ms, "fused_ms": fused_ms, "speedup": speedup})
    machine = describe()
    document = {
        "run": report.name,
        "macs": round(report.macs.ratio, 4),
        "cpu": machine["cpu"],
        "onnxruntime": machine["packages"]["onnxruntime"],
        "rows": rows,
    }
    RESULT.parent.mkdir(parents=True, exist_ok=True)
    RESULT.write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
