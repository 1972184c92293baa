#!/usr/bin/env python3
"""Does it help to select units jointly? Swaps on the sketch's embeddings, against the knapsack's plan.

    python tools/studies/study_joint.py --case minilm-stsb --budgets 0.5 0.3

A unit's residual gradients under all probes are an embedding s_u with <s_u, s_v> ~ interaction of u and v, so that
|sum of s_u over the removed units|^2 estimates the loss of removing them together (docs/method.md, section 2). Starting
from the knapsack's plan, a kept and a removed unit of one group change places while that lowers the estimate; counts,
and so the cost, stay. The estimate is then repeated on other sentences, and the accuracy of both plans is measured
with and without the repair. Writes docs/measurements/studies/joint_selection.json.
"""

from __future__ import annotations

import argparse
from collections import defaultdict

import numpy as np
import torch
from benchmark_accuracy import CASES, Bench, recipe_of
from study_files import machine, save, saved_rows

from optin_export import search
from optin_export.data import load_sources
from optin_export.data.batches import Batch
from optin_export.scoring.optin import observe_all
from optin_export.scoring.shards import Partial
from optin_export.scoring.sketch import Sketch

NAME = "joint_selection"
PROBES = 16


class Gradients(Sketch):
    """Also keeps the gradients themselves, {group key: [samples, units] of every probe and batch}."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.kept: dict[str, list[np.ndarray]] = defaultdict(list)

    def _add(self, totals: Partial, term: str, gradients: dict[str, torch.Tensor]) -> None:
        super()._add(totals, term, gradients)
        if term in "01":
            for key, values in gradients.items():
                self.kept[key].append(values.numpy())


def embeddings(bench: Bench, batches: list[Batch], seed: int, weight: float) -> dict[str, np.ndarray]:
    """Residual gradients of every sketched unit, {group key: [probes x samples, units]}."""
    generator = torch.Generator().manual_seed(seed)
    references = observe_all(bench.model, bench.structure, batches, 768, generator)
    groups = [group for group in bench.structure.groups if group.kind != "heads"]
    sketch = Gradients(bench.model, bench.structure, groups, references, 1.0, generator)
    sketch.add_probes(weight, PROBES)
    samples = sum(len(reference) for reference in references)
    return {key: np.concatenate(parts) / (PROBES * samples) ** 0.5 for key, parts in sketch.kept.items()}


def joint_loss(vectors: dict[str, np.ndarray], kept: dict[str, set[int]]) -> float:
    """|sum of s_u over all removed units|^2."""
    return float(np.square(_total(vectors, kept)).sum())


def _total(vectors: dict[str, np.ndarray], kept: dict[str, set[int]]) -> np.ndarray:
    removed = (v[:, [unit for unit in range(v.shape[1]) if unit not in kept[key]]].sum(1) for key, v in vectors.items())
    return np.sum(list(removed), axis=0)


def swap(vectors: dict[str, np.ndarray], kept: dict[str, set[int]], protected: dict[str, set[int]], limit: int) -> int:
    """Best swaps first, group by group, in place, until none helps or `limit` is reached; returns how many."""
    grams = {key: v.T @ v for key, v in vectors.items()}
    total, swaps, idle = _total(vectors, kept), 0, 0
    keys = list(vectors)
    key = keys[0]
    while swaps < limit and idle < len(keys):
        key = keys[swaps % len(keys)] if idle == 0 else keys[(keys.index(key) + 1) % len(keys)]
        v, gram = vectors[key], grams[key]
        inside = np.array(sorted(kept[key] - protected[key]), dtype=int)
        outside = np.array([unit for unit in range(v.shape[1]) if unit not in kept[key]], dtype=int)
        if not len(inside) or not len(outside):
            idle += 1
            continue
        along = total @ v
        # Removing `a` (kept so far) and bringing back `b`: |total + s_a - s_b|^2 - |total|^2
        change = (2 * along[inside] + gram.diagonal()[inside])[:, None] - 2 * gram[np.ix_(inside, outside)]
        change = change + (gram.diagonal()[outside] - 2 * along[outside])[None]
        a, b = np.unravel_index(int(change.argmin()), change.shape)
        if change[a, b] >= -1e-12:
            idle += 1
            continue
        idle = 0
        leaves, returns = int(inside[a]), int(outside[b])
        total = total + v[:, leaves] - v[:, returns]
        kept[key].remove(leaves)
        kept[key].add(returns)
        swaps += 1
    return swaps


def main() -> None:
    parser = argparse.ArgumentParser(description="Joint selection by swaps against the knapsack's plan.")
    parser.add_argument("--case", choices=CASES, default="minilm-stsb")
    parser.add_argument("--budgets", nargs="+", type=float, default=(0.5, 0.3))
    parser.add_argument("--limits", nargs="+", type=int, default=(50, 400), help="swaps at most")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    bench = Bench(load_sources(recipe_of(args.case, args.seed)))
    scores, _ = bench.score("optin")
    weight = scores.info["lambda"]
    batches = list(bench.sources.calibration)
    vectors = embeddings(bench, list(bench.sources.scoring), args.seed, weight)
    others = embeddings(bench, batches[1::16][:4], args.seed + 1, weight)
    # What the sketch cannot see (masked exactly because of its size) is not for it to move.
    seen = {key: np.square(v).sum(0) for key, v in vectors.items()}
    protected = {key: set(np.nonzero(scores.values[key] > 2 * seen[key])[0].tolist()) for key in vectors}
    rows = saved_rows(NAME)
    curves = bench.curves(scores)
    for budget in args.budgets:
        plan = bench.plan(scores, budget, curves)
        for limit in (0, *args.limits):
            kept = {key: set(plan.groups[key].kept) for key in vectors}
            swaps = swap(vectors, kept, protected, limit) if limit else 0
            groups = dict(plan.groups)
            for key, units in kept.items():
                groups[key] = search.GroupPlan(count=plan.groups[key].count, kept=tuple(sorted(units)))
            changed = plan.model_copy(update={"groups": groups})
            found = {repair: bench.judged(bench.apply_plan(changed, repair)[0]) for repair in ("none", "least-squares")}
            row = {
                "case": args.case,
                "budget": budget,
                "seed": args.seed,
                "swaps": swaps,
                "half": found["none"]["half"],
                "estimate": round(joint_loss(vectors, kept), 5),
                "estimate_other_rows": round(joint_loss(others, kept), 5),
                "drop_unrepaired": found["none"]["drop"],
                "drop_repaired": found["least-squares"]["drop"],
            }
            print(row, flush=True)
            same = [tuple(old[name] for name in ("case", "budget", "seed", "swaps")) for old in rows]
            wanted = tuple(row[name] for name in ("case", "budget", "seed", "swaps"))
            rows = [old for old, key in zip(rows, same, strict=True) if key != wanted] + [row]
            save(NAME, {**machine(), "rows": rows})


if __name__ == "__main__":
    main()
