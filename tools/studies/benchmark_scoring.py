#!/usr/bin/env python3
"""The sketch against exact masking: time, rank correlation, memory, and cost over width.

    python tools/studies/benchmark_scoring.py     # docs/measurements/studies/scoring.json; about ten minutes

All neurons of MiniLM-L6 on one batch of 24 STS-B sentences, in one process. Exact masking is `score: optin-exact`: the
prefix replayed, many units in one batch. Its time is measured on every ``--every``-th neuron of each block and scaled
(each neuron of a block costs the same); its scores are compared on those neurons. Converged scores are those of
``--converged`` probes. Memory is the peak of a fresh process above that of one which only loads the model.
"""

from __future__ import annotations

import argparse
import os
import resource
import subprocess
import sys
import time
from typing import Any

import numpy as np
import torch
from benchmark_accuracy import recipe_of
from scipy.stats import spearmanr
from study_files import save

from optin_export.data import Batch, load_sources
from optin_export.environment import describe
from optin_export.models import TaskModel
from optin_export.models.tasks import wrap
from optin_export.scoring.exact import exact_sums
from optin_export.scoring.optin import observe_all
from optin_export.scoring.sketch import Sketch
from optin_export.units import find_structure

NAME = "scoring"
SENTENCES, ROWS, PROBES = 24, 768, 16


def load() -> tuple[TaskModel, Batch]:
    sources = load_sources(recipe_of("minilm-stsb", 0))
    rows = np.linspace(0, len(sources.calibration_examples) - 1, SENTENCES).astype(int)
    return sources.model, Batch(sources.processor.encode(sources.calibration_examples.take(rows)), rows)


def sketched(model: TaskModel, batch: Batch, probes: int, seed: int, weight: float) -> tuple[np.ndarray, float]:
    """Scores of all neurons, one after another, and the seconds they took (reference pass included)."""
    structure = find_structure(model).only(["neurons"])
    generator = torch.Generator().manual_seed(seed)
    start = time.perf_counter()
    references = observe_all(model, structure, [batch], ROWS, generator)
    sketch = Sketch(model, structure, structure.groups, references, 1.0, generator)
    sketch.add_probes(weight, probes)
    return np.concatenate(list(sketch.values().values())), time.perf_counter() - start


def compare(every: int, converged: int) -> dict[str, Any]:
    """Time ratio and rank correlations of the sketch."""
    model, batch = load()
    structure = find_structure(model).only(["neurons"])
    generator = torch.Generator().manual_seed(0)
    references = observe_all(model, structure, [batch], ROWS, generator)
    sketch = Sketch(model, structure, structure.groups, references, 1.0, generator)
    pilot = sketch.pilot_losses([sketch.work(shard) for shard in sketch.pilot_shards()])
    weight = sum(v.sum() for v in pilot[0].values()) / sum(v.sum() for v in pilot[1].values())
    sketched(model, batch, 1, 0, weight)  # warm-up
    truth, _ = sketched(model, batch, converged, 1000, weight)
    by_probes = []
    for probes in (1, 2, 4, 8, 16, 32):
        runs = [sketched(model, batch, probes, seed, weight) for seed in range(3)]
        correlations = [float(spearmanr(scores, truth).statistic) for scores, _ in runs]
        by_probes.append(
            {
                "probes": probes,
                "seconds": float(np.median([seconds for _, seconds in runs])),
                "correlation_with_converged": [round(value, 4) for value in correlations],
            }
        )
        print(by_probes[-1], flush=True)
    exact, chosen, seconds, offset = [], [], 0.0, 0
    for group in structure.groups:
        units = list(range(0, group.count, every))
        start = time.perf_counter()
        losses = [one / SENTENCES for one in exact_sums(model, structure, group, references[0], 1.0, units)]
        seconds += (time.perf_counter() - start) * group.count / len(units)
        exact.append(losses[0] + weight * losses[1])
        chosen += [offset + unit for unit in units]
        offset += group.count
    measured = np.concatenate(exact)
    fast = next(one for one in by_probes if one["probes"] == PROBES)
    result = {
        "model": "all-MiniLM-L6-v2",
        "neurons": int(sum(group.count for group in structure.groups)),
        "sentences": SENTENCES,
        "tokens": int(batch.inputs["attention_mask"].sum()),
        "converged_probes": converged,
        "sketch": by_probes,
        "exact_seconds": seconds,
        "exact_measured_on": len(chosen),
        "exact_correlation_with_converged": float(spearmanr(measured, truth[chosen]).statistic),
        "probes_compared": PROBES,
        "times_faster": seconds / fast["seconds"],
    }
    print({key: result[key] for key in ("exact_seconds", "exact_correlation_with_converged", "times_faster")})
    return result


def over_width(widths: tuple[int, ...]) -> list[dict[str, float]]:
    """Seconds of the sketch and of one forward pass for BERTs of several FFN widths (random weights)."""
    import transformers

    rows = []
    for width in widths:
        config = transformers.BertConfig(
            vocab_size=1000, hidden_size=256, num_hidden_layers=4, num_attention_heads=4, intermediate_size=width
        )
        torch.manual_seed(0)
        model = wrap(transformers.BertModel(config), "feature-extraction", "mean", True)
        generator = torch.Generator().manual_seed(0)
        inputs = {"input_ids": torch.randint(5, 1000, (16, 24), generator=generator)}
        inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
        batch = Batch(inputs, np.arange(16))
        forward, total = [], []
        for _ in range(5):
            start = time.perf_counter()
            with torch.no_grad():
                model(**inputs)
            forward.append(time.perf_counter() - start)
            total.append(sketched(model, batch, 8, 0, 1.0)[1])
        seconds, base = float(np.median(total)), float(np.median(forward))
        rows.append({"width": width, "units": 4 * width, "sketch_seconds": seconds, "forward_seconds": base})
        print(rows[-1], "forward passes:", round(seconds / base, 1), flush=True)
    return rows


def peak(what: str) -> int:
    """Peak resident bytes of a fresh process that does one thing."""
    command = [sys.executable, __file__, "--only", what]
    return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1])


def only(what: str) -> None:
    model, batch = load()
    if what == "sketch":
        sketched(model, batch, 8, 0, 1.0)
    elif what == "training":
        model.requires_grad_(True)
        optimizer = torch.optim.AdamW(model.parameters())
        model(**batch.inputs).square().sum().backward()
        optimizer.step()
    elif what == "forward":
        with torch.no_grad():
            model(**batch.inputs)
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)


def main() -> None:
    parser = argparse.ArgumentParser(description="The sketch against exact masking.")
    parser.add_argument("--every", type=int, default=8, help="exact masking of every so-many-th neuron")
    parser.add_argument("--converged", type=int, default=256)
    parser.add_argument("--only", choices=("load", "forward", "sketch", "training"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.only:
        only(args.only)
        return
    memory = {what: peak(what) for what in ("load", "forward", "sketch", "training")}
    above = {what: value - memory["load"] for what, value in memory.items()}
    print({what: f"{value / 2**20:.0f} MiB above loading" for what, value in above.items()}, flush=True)
    result = {
        "machine": {"cpu": describe()["cpu"], "threads": torch.get_num_threads(), "cores": os.cpu_count()},
        "torch": torch.__version__,
        "memory_bytes": memory,
        "memory_times_training_step": above["sketch"] / max(above["training"], 1),
        "comparison": compare(args.every, args.converged),
        "width": over_width((256, 512, 1024, 2048, 4096)),
    }
    save(NAME, result)


if __name__ == "__main__":
    main()
