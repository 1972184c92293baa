#!/usr/bin/env python3
"""Does it help to prune in rounds? Score, prune and repair one, two or four times on the way to one budget.

    python tools/study_rounds.py --case resnet20-cifar10 --budgets 0.5 --rounds 1 2 4

Round i of r goes to the budget f^(i/r): the model repaired so far is scored anew, its loss curves are measured anew,
and more units leave. The last plan is then carried out on the original model and repaired towards the original, so that
rounds differ only in which units they chose. Writes docs/measurements/studies/rounds.json.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
from benchmark_accuracy import CASES, Bench, recipe_of

from optin_export import families, scoring, search, surgery
from optin_export.environment import describe
from optin_export.recipe import Budget
from optin_export.sources import load_sources

RESULT = Path(__file__).resolve().parents[1] / "docs" / "measurements" / "studies" / "rounds.json"


def chosen_in_rounds(bench: Bench, budget: float, rounds: int) -> search.Plan:
    """The plan on the original model after so many rounds."""
    sources, prune, seed = bench.sources, bench.sources.recipe.prune, bench.sources.recipe.seed
    kept = {group.key: np.arange(group.count) for group in bench.structure.groups}
    model, structure = bench.model, bench.structure
    for turn in range(1, rounds + 1):
        free = dataclasses.replace(structure, groups=tuple(group for group in structure.groups if group.count))
        costs = families.measure_costs(model, free, sources.fixed(1))
        share = min(1.0, budget ** (turn / rounds) * bench.costs.macs / costs.macs)
        scores = scoring.score(model, free, sources.scoring, prune, seed).values
        weights = bench.weights if turn == 1 else surgery.sensitivities(model, free, sources.calibration, seed)
        curves = surgery.loss_curves(
            model,
            free,
            scores,
            sources.calibration,
            sources.curves,
            least={group.key: bench.least[group.key] for group in free.groups},
            temperature=prune.temperature,
            weights=weights,
            seed=seed,
        )
        align = {group.key: 1 if group.kind == "heads" else prune.align for group in free.groups}
        least = {group.key: bench.least[group.key] for group in free.groups}
        joined = surgery.combined(curves, model.output_kind)
        plan = search.find_plan(scores, costs, Budget(macs=share), align, least, joined)
        for key, group in plan.groups.items():
            kept[key] = kept[key][list(group.kept)]
        groups = {
            group.key: search.GroupPlan(count=group.count, kept=tuple(kept[group.key].tolist()))
            for group in bench.structure.groups
        }
        if turn < rounds:
            model, structure = surgery.rebuild(bench.model, bench.structure, groups, sources.fixed(2))
            surgery.compensate(
                bench.model, model, bench.structure, structure, groups, sources.calibration, weights=bench.weights
            )
    return plan.model_copy(update={"groups": groups})


def main() -> None:
    parser = argparse.ArgumentParser(description="Rounds of score, prune and repair.")
    parser.add_argument("--case", choices=CASES, default="resnet20-cifar10")
    parser.add_argument("--budgets", nargs="+", type=float, default=(0.5,))
    parser.add_argument("--rounds", nargs="+", type=int, default=(1, 2, 4))
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    bench = Bench(load_sources(recipe_of(args.case, args.seed)))
    rows: list[dict[str, Any]] = json.loads(RESULT.read_text())["rows"] if RESULT.exists() else []
    for budget in args.budgets:
        for rounds in args.rounds:
            start = time.perf_counter()
            plan = chosen_in_rounds(bench, budget, rounds)
            seconds = time.perf_counter() - start
            drop = bench.base - bench.accuracy(bench.operate(plan, "least-squares")[0])
            row = {"case": args.case, "budget": budget, "seed": args.seed, "rounds": rounds}
            rows = [old for old in rows if any(old[name] != value for name, value in row.items())]
            rows.append({**row, "drop": round(drop, 3), "seconds": round(seconds)})
            print(rows[-1], flush=True)
            RESULT.parent.mkdir(parents=True, exist_ok=True)
            RESULT.write_text(json.dumps({"cpu": describe()["cpu"], "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
