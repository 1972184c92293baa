#!/usr/bin/env python3
"""How much a run differs on other processors: one recipe on the code paths that torch and its libraries take there.

    python tools/studies/study_processors.py recipes/quickstart.yaml

torch, oneDNN and MKL choose their kernels by what the processor can do; environment variables take instructions away,
so that this machine computes as an older one would, and two threads sum in another order than one. Every variant runs
the recipe up to the export, in a process of its own, and is compared with the first. Writes
docs/measurements/studies/processors.json.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors.numpy import load_file
from study_files import machine, save

from optin_export.data import load_sources
from optin_export.measure import accuracy_of
from optin_export.models import TaskModel, as_function
from optin_export.pruning import load_model
from optin_export.recipe import load_recipe
from optin_export.search import Plan

NAME = "processors"
AVX2 = {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2", "MKL_ENABLE_INSTRUCTIONS": "AVX2"}
OLD = {"ATEN_CPU_CAPABILITY": "default", "ONEDNN_MAX_CPU_ISA": "SSE41", "MKL_ENABLE_INSTRUCTIONS": "SSE4_2"}
#: name -> what is set. The first is what the others are compared with.
VARIANTS: dict[str, dict[str, str]] = {
    "this processor": {},
    "without AVX-512": AVX2,
    "without AVX": OLD,
    "two threads": {"OMP_NUM_THREADS": "2"},
}


def run(recipe: Path, out: Path, settings: list[str], environment: dict[str, str]) -> Path:
    """The recipe up to the export; returns its folder."""
    command = [sys.executable, "-m", "optin_export", str(recipe), "--out", str(out), "--stop-after", "export"]
    own = {**os.environ, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive", **environment}
    words = [word for one in settings for word in ("--set", one)]
    subprocess.run([*command, *words], env=own, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    return out


def plan_of(folder: Path) -> Plan:
    return Plan.model_validate_json((folder / "plan" / "plan.json").read_text())


def differences(first: Path, other: Path, inputs: dict[str, torch.Tensor]) -> dict[str, Any]:
    """Of two runs up to the export.

    scores: the largest difference, relative to the largest score of its group. units: kept by one of both only, and
    kept by the first. outputs: of the smaller models on `inputs`, the largest difference relative to the largest value.
    macs: of both plans, relative to the unpruned model.
    """
    scores = [load_file(folder / "scores" / "scores.safetensors") for folder in (first, other)]
    plans = [plan_of(folder) for folder in (first, other)]
    kept = [{(key, unit) for key, group in plan.groups.items() for unit in group.kept} for plan in plans]
    with torch.no_grad():
        outputs = [load_model(folder / "model", trust_python=True)(**inputs) for folder in (first, other)]
    return {
        "scores": max(float(abs(scores[1][key] - one).max() / abs(one).max()) for key, one in scores[0].items()),
        "units": {"differ": len(kept[0] ^ kept[1]), "kept": len(kept[0])},
        "outputs": float((outputs[1] - outputs[0]).abs().max() / outputs[0].abs().max()),
        "macs": [round(plan.predicted.macs / plan.base.macs, 6) for plan in plans],
        "identical": all(
            (first / name).read_bytes() == (other / name).read_bytes()
            for name in ("scores/scores.safetensors", "plan/plan.json", "onnx/pruned.onnx")
        ),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipes", nargs="+", type=Path)
    parser.add_argument("--set", action="append", default=[], metavar="A.B=C")
    args = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory(prefix="study-processors-") as place:
        for path in args.recipes:
            recipe = load_recipe(path, args.set)
            sources = load_sources(recipe)
            inputs, evaluation = sources.fixed(64), sources.evaluation()
            assert evaluation is not None
            first: Path | None = None
            for name, environment in VARIANTS.items():
                out = run(path, Path(place) / recipe.name / name.replace(" ", "-"), args.set, environment)
                model: TaskModel = load_model(out / "model", trust_python=True)
                row: dict[str, Any] = {"recipe": recipe.name, "variant": name}
                row |= {"environment": environment, "accuracy": accuracy_of(as_function(model), evaluation)}
                if first is not None:
                    row |= differences(first, out, inputs)
                first = first or out
                rows.append(row)
                print(json.dumps(row), flush=True)
    save(NAME, {**machine("torch"), "settings": args.set, "rows": rows})


if __name__ == "__main__":
    main()
