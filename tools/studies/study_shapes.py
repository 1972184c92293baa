#!/usr/bin/env python3
"""How much of the removed MACs the clock sees, for models by shape alone: random weights, no data.

    python tools/studies/study_shapes.py --models deit_tiny_patch16_224 --budgets 0.7 0.5 0.3 --timer 'taskset -c 0'

Each model of timm runs through a whole recipe for onnxruntime on one CPU thread, on random images and without repair:
latency depends on how many units stay, not on which. Speedup efficiency is the measured speedup times the share of
MACs kept; 1 says that time goes with MACs. Writes docs/measurements/studies/shapes.json, one row per model, budget and
batch.
Wants a quiet machine; `--timer` puts a command before the process that measures.
"""

from __future__ import annotations

import argparse
import json
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from benchmark_recipes import REPORTED
from study_files import machine, save

import optin_export
from optin_export.recipe import load_recipe
from optin_export.report.schema import read_report

NAME = "shapes"
BATCHES = [1, 8]


def recipe_of(model: str, budget: float, folder: Path) -> Path:
    """A recipe file beside random images."""
    images = np.random.default_rng(0).integers(0, 256, (16, 224, 224, 3), dtype=np.uint8)
    np.savez(folder / "images.npz", images=images)
    content = {
        "recipe": 1,
        "name": model,
        "model": {"source": f"timm:{model}", "task": "image-classification", "weights": "random"},
        "data": {"calibration": {"source": f"npz:{folder / 'images.npz'}"}},
        "prune": {
            "budget": {"macs": budget},
            "probes": 4,
            "score_samples": 8,
            "allocation": "additive",
            "compensate": False,
        },
        "export": {"batch": BATCHES},
        "targets": [{"engine": "onnxruntime", "device": "cpu", "threads": 1}],
        "gates": {},
    }
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(content), encoding="utf-8")
    return path


def rows_of(model: str, budget: float, timer: list[str], folder: Path) -> list[dict[str, Any]]:
    path, run = recipe_of(model, budget, folder), folder / "run"
    optin_export.run(load_recipe(path), run, stop_after="engines")
    command = [*timer, sys.executable, "-m", "optin_export", str(path), "--out", str(run), "--quiet"]
    done = subprocess.run(command, stdout=subprocess.DEVNULL, check=False)
    if done.returncode not in REPORTED:
        sys.exit(done.returncode)
    report = read_report(run)
    return [
        {
            "model": model,
            "budget": budget,
            "macs": round(report.macs.ratio, 4),
            "batch": one.batch,
            "base_ms": one.base_ms.p50,
            "pruned_ms": one.pruned_ms.p50,
            "speedup": one.speedup.model_dump(),
            "noise_floor": one.noise_floor,
            "neighbours": one.neighbours.model_dump() if one.neighbours else None,
        }
        for one in report.latency
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["deit_tiny_patch16_224"])
    parser.add_argument("--budgets", nargs="+", type=float, default=[0.7, 0.5, 0.3])
    parser.add_argument("--timer", default="", help="command before the process that measures")
    args = parser.parse_args()
    rows: list[dict[str, Any]] = []
    for model in args.models:
        for budget in args.budgets:
            with tempfile.TemporaryDirectory(prefix="study-shapes-") as place:
                rows += rows_of(model, budget, shlex.split(args.timer), Path(place))
            print(json.dumps(rows[-len(BATCHES) :]), flush=True)
    versions = machine("onnxruntime", "torch", "timm")
    save(NAME, {"cpu": versions.pop("cpu"), "versions": versions, "rows": rows})


if __name__ == "__main__":
    main()
