#!/usr/bin/env python3
"""What each part of the method is worth: the same case and budget with one part left out, or with more of it.

    python tools/studies/study_ablation.py --case resnet20-cifar10 --budgets 0.5
    python tools/studies/study_ablation.py --case resnet20-cifar10 --budgets 0.5 --more

Writes docs/measurements/studies/ablation.json, one row per variant.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any
from unittest import mock

from benchmark_accuracy import CASES, Bench, recipe_of
from study_files import machine, save, saved_rows

from optin_export import repair, units
from optin_export.data import load_sources

NAME = "ablation"
#: The module; in the package its name stands for the function.
REPAIR = sys.modules[repair.compensate.__module__]
ROWS = sys.modules[units.input_rows.__module__]
FEW_ROWS = 64
MORE_ROUNDS, MORE_POSITIONS, ALL_IMAGES = 6, 256, 5000


def drop(bench: Bench, budget: float, curves: dict[str, Any] | None, scores: Any) -> dict[str, Any]:
    plan = bench.plan(scores, budget, curves)
    return bench.judged(bench.apply_plan(plan, "least-squares")[0])


def variants(case: str, seed: int, budget: float) -> dict[str, Callable[[], dict[str, Any]]]:
    """{what is left out: how many points are lost then}."""
    recipe = recipe_of(case, seed)
    bench = Bench(load_sources(recipe))
    scores, _ = bench.score("optin")
    curves = bench.curves(scores)
    short = recipe.prune.model_copy(update={"curve_samples": FEW_ROWS})
    few = Bench(load_sources(recipe.model_copy(update={"prune": short})))
    few.weights = bench.weights
    equal = repair.Weights([{} for _ in bench.sources.calibration])

    def patched(name: str, value: object) -> Callable[[], dict[str, Any]]:
        def run() -> dict[str, Any]:
            with mock.patch.object(REPAIR, name, value):
                return drop(bench, budget, curves, scores)

        return run

    def with_equal_rows() -> dict[str, Any]:
        own, bench.weights = bench.weights, equal
        try:
            return drop(bench, budget, curves, scores)
        finally:
            bench.weights = own

    return {
        "nothing": lambda: drop(bench, budget, curves, scores),
        "the rounds through ReLUs": patched("ROUNDS", 0),
        "the output layer's refit": patched("output_layer", lambda *args: None),
        "the rows' weights in the repair": with_equal_rows,
        f"three quarters of the rows of the loss curves ({FEW_ROWS} instead of {recipe.prune.curve_samples})": (
            lambda: drop(bench, budget, few.curves(scores), scores)
        ),
        "the loss curves (allocation: additive)": lambda: drop(bench, budget, None, scores),
    }


def with_more(case: str, seed: int, budget: float) -> dict[str, Callable[[], dict[str, Any]]]:
    """{what there is more of: how many points are lost then}; scores and plan are those of the method as it is."""
    recipe = recipe_of(case, seed)
    bench = Bench(load_sources(recipe))
    scores, _ = bench.score("optin")
    curves = bench.curves(scores)
    plan = bench.plan(scores, budget, curves)

    def repaired(bench: Bench) -> dict[str, Any]:
        return bench.judged(bench.apply_plan(plan, "least-squares")[0])

    def with_images() -> dict[str, Any]:
        rows = recipe.data.calibration.model_copy(update={"samples": ALL_IMAGES})
        data = recipe.data.model_copy(update={"calibration": rows})
        return repaired(Bench(load_sources(recipe.model_copy(update={"data": data}))))

    def patched(module: ModuleType, name: str, value: int) -> Callable[[], dict[str, Any]]:
        def run() -> dict[str, Any]:
            with mock.patch.object(module, name, value):
                return repaired(Bench(bench.sources))  # rows' weights lie at the same positions

        return run

    return {
        f"more rounds through ReLUs ({MORE_ROUNDS} instead of {REPAIR.ROUNDS})": patched(REPAIR, "ROUNDS", MORE_ROUNDS),
        f"more positions per image ({MORE_POSITIONS} instead of {ROWS.POSITIONS})": patched(
            ROWS, "POSITIONS", MORE_POSITIONS
        ),
        f"more images for the repair ({ALL_IMAGES} instead of {recipe.data.calibration.samples})": with_images,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description="The method with one part left out.")
    parser.add_argument("--case", choices=CASES, default="resnet20-cifar10")
    parser.add_argument("--budgets", nargs="+", type=float, default=(0.5,))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--more", action="store_true", help="more of what the repair sees, instead of leaving out")
    args = parser.parse_args()
    rows = saved_rows(NAME)
    for budget in args.budgets:
        for left_out, run in (with_more if args.more else variants)(args.case, args.seed, budget).items():
            row = {"case": args.case, "budget": budget, "seed": args.seed, "left_out": left_out}
            rows = [old for old in rows if any(old[name] != value for name, value in row.items())]
            rows.append({**row, **run()})
            print(rows[-1], flush=True)
            save(NAME, {**machine(), "rows": rows})


if __name__ == "__main__":
    main()
