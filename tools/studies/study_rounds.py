#!/usr/bin/env python3
"""Does it help to prune in rounds? Score, prune and repair one, two or four times on the way to one budget.

    python tools/studies/study_rounds.py --case resnet20-cifar10 --budgets 0.5 --rounds 1 2 4

What `prune.rounds` of a recipe does; rounds differ only in which units they choose. Writes
docs/measurements/studies/rounds.json.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from benchmark_accuracy import CASES, Bench, recipe_of

from optin_export import search
from optin_export.data import load_sources
from optin_export.environment import describe
from optin_export.recipe import Budget
from optin_export.stages.rounds import choose_in_rounds

Arrays = Mapping[str, np.ndarray]
RESULT = Path(__file__).resolve().parents[2] / "docs" / "measurements" / "studies" / "rounds.json"


def bench_of(case: str, scorer: str, samples: int | None, seed: int) -> Bench:
    """The case with another scorer, or with so many calibration rows."""
    recipe = recipe_of(case, seed)
    rows = recipe.data.calibration.model_copy(update={"samples": samples or recipe.data.calibration.samples})
    data = recipe.data.model_copy(update={"calibration": rows})
    prune = recipe.prune.model_copy(update={"score": scorer})
    return Bench(load_sources(recipe.model_copy(update={"data": data, "prune": prune})))


def chosen_in_rounds(bench: Bench, scores: Arrays, curves: Arrays, budget: float, rounds: int) -> search.Plan:
    """The plan on the original model after so many rounds."""
    recipe = bench.sources.recipe
    prune = recipe.prune.model_copy(update={"budget": Budget(macs=budget), "rounds": rounds})
    sources = dataclasses.replace(bench.sources, recipe=recipe.model_copy(update={"prune": prune}))
    return choose_in_rounds(sources, bench.structure, bench.costs, bench.least, scores, curves, bench.weights)


def main() -> None:
    parser = argparse.ArgumentParser(description="Rounds of score, prune and repair.")
    parser.add_argument("--case", choices=CASES, default="resnet20-cifar10")
    parser.add_argument("--budgets", nargs="+", type=float, default=(0.5,))
    parser.add_argument("--rounds", nargs="+", type=int, default=(1, 2, 4))
    parser.add_argument("--scorer", default="optin")
    parser.add_argument("--samples", type=int, help="calibration rows, in place of the case's own")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    bench = bench_of(args.case, args.scorer, args.samples, args.seed)
    scores, _ = bench.score(args.scorer)
    curves = bench.measured_curves(scores)
    rows: list[dict[str, Any]] = json.loads(RESULT.read_text())["rows"] if RESULT.exists() else []
    for budget in args.budgets:
        for rounds in args.rounds:
            start = time.perf_counter()
            plan = chosen_in_rounds(bench, scores.values, curves, budget, rounds)
            seconds = time.perf_counter() - start
            judged = bench.judged(bench.apply_plan(plan, "least-squares")[0])
            row = {"case": args.case, "scorer": args.scorer, "budget": budget, "seed": args.seed, "rounds": rounds}
            row |= {"samples": len(bench.sources.calibration_examples)}
            rows = [old for old in rows if any(old[name] != value for name, value in row.items())]
            rows.append({**row, **judged, "seconds": round(seconds)})
            print(rows[-1], flush=True)
            RESULT.parent.mkdir(parents=True, exist_ok=True)
            RESULT.write_text(json.dumps({"cpu": describe()["cpu"], "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
