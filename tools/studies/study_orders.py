#!/usr/bin/env python3
"""Is one order of the units enough? Two scorers' orders in one search, the better one at every count of every group.

    python tools/studies/study_orders.py --cases minilm-stsb vit-cifar10 --budgets 0.5 0.3

The loss curves are measured for the order of each scorer; the search then takes their lower envelope, and a group keeps
the best units of whichever order was better at the chosen count. Writes docs/measurements/studies/orders.json.
"""

from __future__ import annotations

import argparse

import numpy as np
from benchmark_accuracy import CASES, Bench, recipe_of
from study_files import machine, save, saved_rows

from optin_export import repair, scoring, search
from optin_export.data import load_sources

NAME = "orders"
Curves = dict[str, np.ndarray]


def on_one_scale(measured: dict[str, Curves], output_kind: str) -> dict[str, Curves]:
    """{scorer: curves}, combined with the same weights of trajectory and output for all scorers."""
    joined = {f"{scorer}/{key}": curve for scorer, curves in measured.items() for key, curve in curves.items()}
    combined = repair.combined(joined, output_kind)
    return {scorer: {key: combined[f"{scorer}/{key}"] for key in curves} for scorer, curves in measured.items()}


def plan_of(bench: Bench, scores: dict[str, scoring.Scores], curves: dict[str, Curves], budget: float) -> search.Plan:
    """The plan over the lower envelope of all scorers' curves."""
    names = list(curves)
    first = scores[names[0]]
    envelope = {
        key: np.stack([curve[:, 0], np.min([curves[name][key][:, 1] for name in names], axis=0)], axis=1)
        for key, curve in curves[names[0]].items()
    }
    plan = bench.plan(first, budget, envelope)
    groups = {}
    for key, group in plan.groups.items():
        count = len(group.kept)
        losses = [np.interp(count, curves[name][key][:, 0], curves[name][key][:, 1]) for name in names]
        order = np.argsort(-scores[names[int(np.argmin(losses))]].values[key], kind="stable")
        groups[key] = search.GroupPlan(count=group.count, kept=tuple(sorted(int(unit) for unit in order[:count])))
    return plan.model_copy(update={"groups": groups})


def main() -> None:
    parser = argparse.ArgumentParser(description="One order of the units, or the better of two at every count.")
    parser.add_argument("--cases", nargs="+", choices=CASES, default=("minilm-stsb", "vit-cifar10"))
    parser.add_argument("--scorers", nargs="+", default=("optin", "activation"))
    parser.add_argument("--budgets", nargs="+", type=float, default=(0.5, 0.3))
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    rows = saved_rows(NAME)
    for case in args.cases:
        bench = Bench(load_sources(recipe_of(case, args.seed)))
        scores = {name: bench.score(name)[0] for name in args.scorers}
        curves = on_one_scale(
            {name: bench.measured_curves(found) for name, found in scores.items()}, bench.model.output_kind
        )
        for budget in args.budgets:
            for name, chosen in (*((name, {name: curves[name]}) for name in args.scorers), ("both", curves)):
                plan = plan_of(bench, scores, chosen, budget)
                dense, _ = bench.apply_plan(plan, "least-squares")
                row = {"case": case, "budget": budget, "seed": args.seed, "orders": name}
                rows = [old for old in rows if any(old[field] != value for field, value in row.items())]
                predicted = None if plan.predicted_loss is None else round(plan.predicted_loss, 5)
                rows.append({**row, "predicted": predicted, **bench.judged(dense)})
                print(rows[-1], flush=True)
                save(NAME, {**machine(), "rows": rows})


if __name__ == "__main__":
    main()
