#!/usr/bin/env python3
"""What onnxruntime's SkipLayerNormFusion costs or saves on this CPU: engines with and without it, interleaved.

    python tools/studies/study_fusion.py RUN

RUN: the folder of a finished run; every graph in its onnx/ is built twice for one thread. All engines take turns in the
same blocks, as a run's own measurement does it. Writes docs/measurements/studies/fusion.json, one row per graph and
batch. Wants a quiet machine.
"""

from __future__ import annotations

import argparse
import tempfile
from dataclasses import asdict
from pathlib import Path
from unittest import mock

import numpy as np
from study_files import inputs_of, machine, save

from optin_export.engines import onnxruntime as backend
from optin_export.measure import Interleaved, interleaved
from optin_export.measure.bootstrap import Interval, ratio_of_medians
from optin_export.recipe import Target
from optin_export.report.schema import read_report

NAME = "fusion"
BLOCKS = 40


def speedup_of(found: Interleaved, name: str, against: str) -> Interval:
    """How many times faster `name` is, with the interval over blocks."""
    return ratio_of_medians(found.samples[against], found.samples[name], np.random.default_rng(found.seed))


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
    document = {
        "run": report.name,
        "macs": round(report.macs.ratio, 4),
        **machine("onnxruntime"),
        "rows": rows,
    }
    save(NAME, document)


if __name__ == "__main__":
    main()
