#!/usr/bin/env python3
"""How much of a loss curve should be the trajectory's, and how much the output's?

    python tools/studies/study_share.py --cases vit-cifar10 minilm-stsb --budgets 0.5 0.3

The curves are measured once; only the share of the trajectory in them changes (TRAJECTORY_SHARE in
repair/allocation.py).
Writes docs/measurements/studies/share.json, one row per case, budget and share.
"""

from __future__ import annotations

import argparse

from benchmark_accuracy import CASES, Bench, recipe_of
from study_files import machine, save, saved_rows

from optin_export import repair
from optin_export.data import load_sources
from optin_export.repair.allocation import TRAJECTORY_SHARE

NAME = "share"


def main() -> None:
    parser = argparse.ArgumentParser(description="The trajectory's share in the loss curves.")
    parser.add_argument("--cases", nargs="+", choices=CASES, default=("vit-cifar10", "minilm-stsb"))
    parser.add_argument("--budgets", nargs="+", type=float, default=(0.5, 0.3))
    parser.add_argument("--shares", nargs="+", type=float, default=(0.0, 0.5, 1.0))
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    rows = saved_rows(NAME)
    for case in args.cases:
        bench = Bench(load_sources(recipe_of(case, args.seed)))
        scores, _ = bench.score("optin")
        measured, kind = bench.measured_curves(scores), bench.model.output_kind
        own = TRAJECTORY_SHARE[kind]
        for share in args.shares:
            curves = repair.combined(measured, kind, share)
            for budget in args.budgets:
                dense, _ = bench.apply_plan(bench.plan(scores, budget, curves), "least-squares")
                row = {"case": case, "budget": budget, "seed": args.seed, "share": share}
                rows = [old for old in rows if any(old[name] != value for name, value in row.items())]
                rows.append({**row, "default": share == own, **bench.judged(dense)})
                print(rows[-1], flush=True)
                save(NAME, {**machine(), "rows": rows})


if __name__ == "__main__":
    main()
