#!/usr/bin/env python3
"""What a recipe costs against the size of the model: time and memory of every stage, and the forecast beside them.

    python tools/studies/study_cost.py                  # all models, those that are there already skipped
    python tools/studies/study_cost.py bert-12x768      # some of them, again
    python tools/studies/render_results.py              # the tables in docs/results.md

Models have random weights: the time does not depend on their values. Each runs in a process of its own, from scoring
to the repaired model, on one thread. Beside it, in the same process: one forward and one backward pass, with the
gradients of all weights, of the calibration rows. Seconds are CPU time, which other work disturbs less.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
RESULT = ROOT / "docs" / "measurements" / "studies" / "cost.json"
#: Calibration rows of a text model, and of an image model, whose rows are longer.
ROWS = {"text": 1024, "image": 256}
LAST = "surgery"


def _bert(layers: int, hidden: int) -> dict[str, Any]:
    sizes = {"num_hidden_layers": layers, "hidden_size": hidden, "intermediate_size": 4 * hidden}
    args = {**sizes, "num_attention_heads": hidden // 64}
    return {"source": "hf:model_type=bert", "task": "feature-extraction", "pooling": "mean", "args": args}


def _vit(name: str) -> dict[str, Any]:
    shape = {"size": [224, 224], "mean": [0.5], "std": [0.5]}
    args = {"num_classes": 1000}
    return {"source": f"timm:{name}_patch16_224", "task": "image-classification", "args": args, "preprocess": shape}


MODELS: dict[str, dict[str, Any]] = {
    **{f"bert-{layers}x256": _bert(layers, 256) for layers in (4, 8, 12, 24)},
    **{f"bert-12x{hidden}": _bert(12, hidden) for hidden in (512, 768)},
    "mpnet-12x768": {"source": "hf:model_type=mpnet", "task": "feature-extraction", "pooling": "mean", "args": {}},
    "vit-small": _vit("vit_small"),
    "vit-base": _vit("vit_base"),
    "llama-0.1b": {
        "source": "hf:model_type=llama",
        "task": "text-generation",
        "args": {
            "num_hidden_layers": 12,
            "hidden_size": 768,
            "intermediate_size": 2048,
            "num_attention_heads": 12,
            "num_key_value_heads": 4,
            "vocab_size": 30522,
        },
    },
}


def recipe_of(name: str, folder: Path) -> dict[str, Any]:
    """The recipe of a model; writes its data into the folder."""
    import accuracy_cases
    import numpy as np

    model = {**MODELS[name], "weights": "random"}
    kind = "image" if model["task"] == "image-classification" else "text"
    if kind == "image":
        images = np.random.default_rng(0).integers(0, 256, (ROWS[kind], 224, 224, 3), dtype=np.uint8)
        np.savez(folder / "images.npz", images=images)
        data = {"source": f"npz:{folder / 'images.npz'}"}
        prune = {"score_samples": 16, "curve_samples": 64}
    else:
        model["tokenizer"] = accuracy_cases._minilm()
        data = {
            "source": f"csv:{accuracy_cases.SHARED / 'stsb/train.csv'}",
            "columns": {"text": 0},
            "samples": ROWS[kind],
        }
        prune = {}
    return {
        "recipe": 1,
        "name": name,
        "model": model,
        "data": {"calibration": data},
        "prune": {"budget": {"macs": 0.5}, **prune},
        "export": {"batch": [1], **({"sequence": 64} if kind == "text" else {})},
        "targets": [{"engine": "onnxruntime", "device": "cpu", "threads": 1}],
    }


def one(name: str) -> dict[str, Any]:
    """Measure a model in this process."""
    import torch

    from optin_export.data import load_sources
    from optin_export.displays import Quiet
    from optin_export.environment import describe
    from optin_export.recipe import validate
    from optin_export.stages.forecast import NAME
    from optin_export.stages.pipeline import run
    from optin_export.workdir.durations import recall

    torch.set_num_threads(1)

    class Clock(Quiet):
        """CPU seconds of every stage."""

        def __init__(self) -> None:
            self.seconds: dict[str, float] = {}
            self.last = time.process_time()

        def start(self, stage: str) -> None:
            self.stage, self.last = stage, time.process_time()

        def finish(self, stage: str, seconds: float, reused: bool) -> None:
            self.seconds[stage] = round(time.process_time() - self.last, 2)

    with tempfile.TemporaryDirectory() as folder:
        recipe = validate(recipe_of(name, Path(folder)), Path(folder))
        clock, start = Clock(), time.perf_counter()
        run(recipe, Path(folder) / "run", stop_after=LAST, display=clock)
        seconds = time.perf_counter() - start
        forecast = json.loads((Path(folder) / "run" / NAME).read_text(encoding="utf-8"))
        known = recall(Path(folder) / "run")
        sources = load_sources(recipe)
        passes = _forward_and_backward(sources)
        parameters = sum(tensor.numel() for tensor in sources.model.parameters())
    stages = ("scoring", "curves", "search", "surgery")
    whole = sum(clock.seconds[stage] for stage in stages)
    return {
        "machine": describe(),
        "parameters": parameters,
        "rows": len(sources.calibration_examples),
        "cpu_seconds": clock.seconds,
        "wall_seconds": round(seconds, 1),
        "stage_wall_seconds": {stage: entry["seconds"] for stage, entry in known.items()},
        "peak_bytes": {stage: entry["peak_bytes"] for stage, entry in known.items()},
        "expected_seconds": {stage: forecast["seconds"].get(stage) for stage in stages},
        "expected_peak_bytes": forecast["peak_bytes"],
        "forward_backward_cpu_seconds": round(passes, 2),
        "ratio": round(whole / passes, 2),
    }


def _forward_and_backward(sources: Any) -> float:
    """CPU seconds for all calibration rows, from every fourth batch (they are ordered by length)."""
    import torch

    model, batches = sources.model, list(sources.calibration)
    model.requires_grad_(True)
    chosen = batches[len(batches) % 4 // 2 :: 4]
    model(**chosen[0].inputs)
    start = time.process_time()
    for batch in chosen:
        model(**batch.inputs).float().square().mean().backward()
        model.zero_grad()
    torch.set_grad_enabled(True)
    return (time.process_time() - start) * len(sources.calibration_examples) / sum(len(one.rows) for one in chosen)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", metavar="MODEL", help=f"some of {', '.join(MODELS)}, measured again")
    parser.add_argument("--one", choices=MODELS, help="measure in this process and print JSON")
    options = parser.parse_args()
    if options.one:
        print(json.dumps(one(options.one)))
        return
    known = json.loads(RESULT.read_text(encoding="utf-8")) if RESULT.exists() else {}
    for name in options.models or [name for name in MODELS if name not in known]:
        command = [sys.executable, __file__, "--one", name]
        done = subprocess.run(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, stdout=subprocess.PIPE, check=True)
        known[name] = json.loads(done.stdout.splitlines()[-1])
        RESULT.write_text(json.dumps({one: known[one] for one in MODELS if one in known}, indent=1) + "\n", "utf-8")
        print(name, known[name]["ratio"], known[name]["cpu_seconds"], known[name]["expected_seconds"], flush=True)


if __name__ == "__main__":
    main()
