#!/usr/bin/env python3
"""Where the time of a run's engines goes: milliseconds of one call by operator, by onnxruntime's own profile.

    python tools/studies/study_operators.py RUN --batch 8

RUN: the folder of a finished run with an engine of onnxruntime on the CPU. The engines' calls take turns; an operator's
time is the median over calls of the sum over its nodes. Profiling costs a little itself: shares are what counts.
Writes docs/measurements/studies/operators.json, one row per engine.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from study_files import inputs_of, machine, save

from optin_export.report.schema import read_report

NAME = "operators"
WARM_UP = 5


def profiled(engines: dict[str, Path], inputs: dict[str, np.ndarray], calls: int) -> dict[str, dict[str, float]]:
    """{engine: {operator: milliseconds of one call}}, largest first."""
    with tempfile.TemporaryDirectory(prefix="study-operators-") as folder:
        sessions = {}
        for name, path in engines.items():
            options = onnxruntime.SessionOptions()
            options.intra_op_num_threads = 1
            options.log_severity_level = 3
            options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL  # they are optimised
            options.enable_profiling = True
            options.profile_file_prefix = str(Path(folder) / name)
            sessions[name] = onnxruntime.InferenceSession(str(path), options)
        for _ in range(WARM_UP + calls):
            for session in sessions.values():
                session.run(None, {value.name: inputs[value.name] for value in session.get_inputs()})
        return {name: _by_operator(json.loads(Path(one.end_profiling()).read_text())) for name, one in sessions.items()}


def _by_operator(events: list[dict[str, Any]]) -> dict[str, float]:
    calls: list[Counter[str]] = []
    current: Counter[str] = Counter()
    for event in events:
        if event.get("cat") == "Node" and event["name"].endswith("_kernel_time"):
            current[event["args"]["op_name"]] += event["dur"]
        elif event.get("name") == "model_run":
            calls.append(current)
            current = Counter()
    times: dict[str, list[int]] = defaultdict(list)
    for call in calls[WARM_UP:]:
        for name in call:
            times[name].append(call[name])
    found = {name: round(float(np.median(values)) / 1e3, 4) for name, values in times.items()}
    return dict(sorted(found.items(), key=lambda one: -one[1]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--calls", type=int, default=30)
    args = parser.parse_args()
    report = read_report(args.run)
    folder = next(iter(sorted((args.run / "engines").glob("onnxruntime-cpu-*"))))
    inputs = {name: rows[: args.batch] for name, rows in inputs_of(args.run).items()}
    engines = {path.stem: path for path in sorted(folder.glob("*.onnx"))}
    document = {
        "run": report.name,
        "batch": args.batch,
        "macs": round(report.macs.ratio, 4),
        **machine("onnxruntime"),
        "calls": args.calls,
        "rows": [{"engine": name, "ms": found} for name, found in profiled(engines, inputs, args.calls).items()],
    }
    save(NAME, document)


if __name__ == "__main__":
    main()
