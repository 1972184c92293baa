#!/usr/bin/env python3
"""What a short fine-tune adds to the repair: the same model before and after distillation on the calibration images.

    python tools/studies/study_finetune.py --case vit-cifar10 --budgets 0.5 0.3 --steps 100 300

Each budget is pruned and repaired once. The fine-tune is the built-in one (`finetune:` of a recipe), from the unpruned
model, on unlabelled calibration rows; accuracy is that of the torch models on the half of the held-out rows that may
choose. Writes docs/measurements/studies/finetune.json, a row per budget, number of steps (0: the repaired model) and
learning rate.
"""

from __future__ import annotations

import argparse
import time
from typing import Any

from benchmark_accuracy import CASES, Bench, recipe_of
from study_files import machine, save, saved_rows

from optin_export import repair
from optin_export.data import load_sources
from optin_export.recipe import FinetuneSection

NAME = "finetune"


def main() -> None:
    parser = argparse.ArgumentParser(description="Accuracy with and without a short fine-tune.")
    parser.add_argument("--case", choices=CASES, default="vit-cifar10")
    parser.add_argument("--budgets", nargs="+", type=float, default=(0.5, 0.3))
    parser.add_argument("--steps", nargs="+", type=int, default=(100, 300))
    parser.add_argument("--learning-rate", type=float, default=FinetuneSection().learning_rate)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    recipe = recipe_of(args.case, args.seed)
    bench = Bench(load_sources(recipe.model_copy(update={"finetune": FinetuneSection()})))
    scores, _ = bench.score("optin")
    curves = bench.curves(scores)
    rows = saved_rows(NAME)
    for budget in args.budgets:
        repaired, seconds = bench.apply_plan(bench.plan(scores, budget, curves), "least-squares")
        for steps in (0, *args.steps):
            row: dict[str, Any] = {"case": args.case, "budget": budget, "seed": args.seed, "steps": steps}
            row["learning_rate"] = args.learning_rate if steps else None
            model, facts = repaired, {"seconds": round(seconds)}
            if steps:
                section = FinetuneSection(steps=steps, learning_rate=args.learning_rate)
                training, held_out = bench.sources.training()
                start = time.perf_counter()
                model, tuned = repair.fine_tune(
                    bench.model, bench.structure, repaired, training, held_out, section, seed=args.seed
                )
                facts = {"seconds": round(time.perf_counter() - start)}
                facts |= {key: tuned.to_json()[key] for key in ("before", "after", "note")}
            rows = [old for old in rows if any(old[name] != value for name, value in row.items())]
            rows.append({**row, **bench.judged(model), **facts})
            print(rows[-1], flush=True)
            save(NAME, {**machine(), "rows": rows})


if __name__ == "__main__":
    main()
