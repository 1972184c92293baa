#!/usr/bin/env python3
"""Accuracy kept without retraining, for every scorer: one row per (case, scorer, repair, budget, seed).

    python tools/studies/benchmark_accuracy.py --cases minilm-stsb --scorers optin magnitude --budgets 0.5 0.3 --seeds 0
    python tools/studies/render_results.py                         # docs/results.md and its plots from the result files

Rows go to docs/measurements/accuracy/<case>.json as they are measured; those that are there already are skipped, so
that an interrupted run goes on where it was (``--again`` measures them again). Accuracy is that of the torch models on
held-out rows, of all and of each part of them (held_out.py); the same models as engines are measured by
benchmark_recipes.py. Rows without parts are older than the parts: they stay beside those that are measured now.
"""

from __future__ import annotations

import argparse
import copy
import json
import platform
import time
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path
from typing import Any

import comparison_scorers  # noqa: F401 - it registers scorers that no recipe has
import held_out
import numpy as np
import torch
from accuracy_cases import CASES, recipe_of, trained_on

from optin_export import repair, scoring, search, units
from optin_export.data import Sources, load_sources, read_data
from optin_export.environment import describe
from optin_export.measure import evaluate, predict
from optin_export.models import TaskModel, as_function
from optin_export.recipe import Budget, FinetuneSection

__all__ = ["CASES", "Bench", "recipe_of"]

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "docs" / "measurements" / "accuracy"
#: A scorer alone takes the recipe's default allocation; "scorer/additive" is the knapsack over sums of its scores.
SCORERS = ("optin", "optin/additive", "fisher", "activation", "magnitude", "random")
BUDGETS = (0.7, 0.6, 0.5, 0.4, 0.3)
SEEDS = (0, 1, 2)
#: "gauss-newton" is least squares and then the refit of gains and biases to the output; "distill" is least squares and
#: then `prune.repair: distill`.
REPAIRS = {"none": False, "rescale": "rescale", "least-squares": True, "gauss-newton": True, "distill": True}


@dataclass
class Bench:
    """One case under one seed: loaded once, scored once per scorer."""

    sources: Sources
    last: tuple[search.Plan, TaskModel, float] | None = None
    tuned: dict[str, Any] | None = None

    def __post_init__(self) -> None:
        self.model = self.sources.model
        self.structure = units.find_structure(self.model)
        self.costs = units.measure_costs(self.model, self.structure, self.sources.fixed(1))
        examples, evaluation = self.sources.evaluation_examples, self.sources.evaluation()
        assert examples is not None and evaluation is not None
        self.texts = trained_on(self.sources.recipe.name)
        self.examples, self.evaluation = examples, evaluation
        self.parts = held_out.parts(examples.columns, self.texts)
        self.base = self.statistics(self.model)

    def statistics(self, model: TaskModel) -> np.ndarray:
        """The metric's statistic of every held-out row."""
        return predict(as_function(model), self.evaluation)

    def judged(self, model: TaskModel) -> dict[str, Any]:
        """What studies look at, and so what defaults are chosen by: points on the rows that may choose."""
        rows = self.parts[held_out.CHOOSE]
        return held_out.judged(self.base, self.statistics(model), self.evaluation.metric, rows)

    def compared(self, model: TaskModel) -> dict[str, Any]:
        """Points of both models and points lost: on all held-out rows, and on each part with an interval."""
        metric, statistics, found = self.evaluation.metric, self.statistics(model), {}
        for name, rows in {"": np.arange(len(self.base)), **self.parts}.items():
            one = evaluate(self.base[rows], statistics[rows], metric, self.sources.recipe.seed)
            found[name] = {"base": one.base, "accuracy": one.pruned, "drop": one.drop}
            found[name] |= {"drop_low": one.drop_low, "drop_high": one.drop_high} if name else {}
        found = {name: {key: round(value, 3) for key, value in one.items()} for name, one in found.items()}
        return {**found.pop(""), "parts": found}

    def score(self, scorer: str) -> tuple[scoring.Scores, float]:
        prune = self.sources.recipe.prune.model_copy(update={"score": scorer})
        start = time.perf_counter()
        scores = scoring.score(self.model, self.structure, self.sources.scoring, prune, self.sources.recipe.seed)
        return scores, time.perf_counter() - start

    def curves(self, scores: scoring.Scores) -> dict[str, np.ndarray]:
        """The loss curves of `allocation: joint`, one loss per point."""
        return repair.combined(self.measured_curves(scores), self.model.output_kind)

    def measured_curves(self, scores: scoring.Scores) -> dict[str, np.ndarray]:
        """The same with both terms apart."""
        return repair.loss_curves(
            self.model,
            self.structure,
            scores.values,
            self.sources.calibration,
            self.sources.curves,
            self.settings(),
            least=self.least,
            weights=self.weights,
        )

    def settings(self, **changes: Any) -> repair.RepairSettings:
        recipe = self.sources.recipe
        return repair.RepairSettings(temperature=recipe.prune.temperature, seed=recipe.seed, **changes)

    @cached_property
    def weights(self) -> repair.Weights:
        return repair.sensitivities(self.model, self.structure, self.sources.calibration, self.sources.recipe.seed)

    @property
    def least(self) -> dict[str, int]:
        return {group.key: 0 if group.sublayer is not None else 1 for group in self.structure.groups}

    def plan(self, scores: scoring.Scores, budget: float, curves: dict[str, np.ndarray] | None = None) -> search.Plan:
        align = units.steps_of(self.structure.groups, self.sources.recipe.alignment)
        return search.find_plan(scores.values, self.costs, Budget(macs=budget), align, self.least, curves)

    def apply_plan(self, plan: search.Plan, how: str) -> tuple[TaskModel, float]:
        """The repaired model and the seconds that it took; what follows least squares goes on from those of before."""
        start = time.perf_counter()
        if how == "distill":
            if self.last is None or self.last[0] != plan:
                self.apply_plan(plan, "least-squares")
            assert self.last is not None
            recipe = self.sources.recipe
            section = FinetuneSection() if recipe.tuning is None else recipe.tuning
            training, kept_out = self.sources.training()
            tuned, found = repair.fine_tune(
                self.model,
                self.structure,
                self.last[1],
                training,
                kept_out,
                section,
                temperature=recipe.prune.temperature,
                seed=recipe.seed,
            )
            self.tuned = found.to_json()
            return tuned, self.last[2] + time.perf_counter() - start
        if how == "gauss-newton" and self.last is not None and self.last[0] == plan:
            dense, seconds = copy.deepcopy(self.last[1]), self.last[2]
            recipe = self.sources.recipe
            reference = repair.outputs_of(self.model, self.structure, self.sources.calibration, recipe.seed)
            repair.refine(dense, reference, temperature=recipe.prune.temperature)
            return dense, seconds + time.perf_counter() - start
        operation = repair.apply_plan(
            self.model,
            self.structure,
            plan,
            self.sources.calibration,
            self.sources.fixed(2),
            self.settings(repair=REPAIRS[how], gauss_newton=how == "gauss-newton"),
            weights=None if how == "none" else self.weights,
        )
        seconds = time.perf_counter() - start
        if how == "least-squares":
            self.last = plan, operation.dense, seconds
        return operation.dense, seconds


def measure(
    case: str,
    scorers: Iterable[str],
    repairs: Iterable[str],
    budgets: Iterable[float],
    seeds: Iterable[int],
    again: bool,
) -> None:
    """Measure every combination that the case's result file does not hold yet."""
    path = RESULTS / f"{case}.json"
    rows = _stored(path)
    for seed in seeds:
        wanted = [
            (scorer, repair, budget)
            for scorer in scorers
            for budget in budgets
            for repair in repairs
            if again or not any(_key(row) == (scorer, repair, budget, seed, True) for row in rows)
        ]
        if not wanted:
            continue
        recipe = recipe_of(case, seed)
        if "distill" in repairs:  # with the rows that it holds out
            recipe = recipe.model_copy(update={"prune": recipe.prune.model_copy(update={"repair": "distill"})})
        bench = Bench(load_sources(recipe))
        done: dict[str, tuple[scoring.Scores, float]] = {}
        curves: dict[str, tuple[dict[str, np.ndarray], float]] = {}
        for scorer, method_of_repair, budget in wanted:
            method, _, allocation = scorer.partition("/")
            if method not in done:
                done[method] = bench.score(method)
            scores, scoring_seconds = done[method]
            if allocation != "additive" and method not in curves:
                start = time.perf_counter()
                curves[method] = bench.measured_curves(scores), time.perf_counter() - start
            found, curves_seconds = curves[method] if allocation != "additive" else (None, 0.0)
            combined = None if found is None else repair.combined(found, bench.model.output_kind)
            plan = bench.plan(scores, budget, combined)
            dense, repair_seconds = bench.apply_plan(plan, method_of_repair)
            row = {
                "scorer": scorer,
                "repair": method_of_repair,
                "budget": budget,
                "seed": seed,
                **bench.compared(dense),
                "macs": round(plan.predicted.macs / plan.base.macs, 4),
                "params": round(plan.predicted.params / plan.base.params, 4),
                "scoring_seconds": round(scoring_seconds, 1),
                "curves_seconds": round(curves_seconds, 1),
                "surgery_seconds": round(repair_seconds, 1),
                "kept": {key: len(group.kept) for key, group in plan.groups.items()},
                "distilled": bench.tuned if method_of_repair == "distill" else None,
                "score_facts": {key: round(value, 4) for key, value in scores.info.items()},
                **_occasion(),
            }
            rows = [old for old in rows if _key(old) != _key(row)] + [row]
            print(case, *(row[name] for name in ("scorer", "repair", "budget", "seed", "drop")), flush=True)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(_document(case, bench, sorted(rows, key=_key)), indent=1) + "\n")


def _key(row: dict[str, Any]) -> tuple[str, str, float, int, bool]:
    return row["scorer"], row["repair"], row["budget"], row["seed"], "parts" in row


def _occasion() -> dict[str, Any]:
    """On what a row is measured, and when."""
    machine = {"cpu": describe()["cpu"], "threads": torch.get_num_threads(), "platform": platform.platform()}
    return {"machine": machine, "torch": torch.__version__, "written": datetime.now(UTC).strftime("%Y-%m-%d")}


def _stored(path: Path) -> list[dict[str, Any]]:
    """The rows of a result file; what older files say once of all rows, each row says."""
    if not path.exists():
        return []
    document = json.loads(path.read_text())
    shared = {key: document[key] for key in ("machine", "torch", "written") if key in document}
    return [shared | row for row in document["rows"]]


def _document(case: str, bench: Bench, rows: list[dict[str, Any]]) -> dict[str, Any]:
    return {
        "case": case,
        "metric": bench.evaluation.metric,
        **held_out.facts(bench.examples.columns, bench.texts),
        "calibration_rows": len(bench.sources.calibration_examples),
        "scoring_rows": min(bench.sources.recipe.prune.score_samples, len(bench.sources.calibration_examples)),
        "curve_rows": min(bench.sources.recipe.prune.curve_samples, len(bench.sources.calibration_examples)),
        "units": {group.key: group.count for group in bench.structure.groups},
        "rows": rows,
    }


def describe_rows(case: str) -> None:
    """Write what is known of the held-out rows into the case's result file, and measure nothing."""
    path = RESULTS / f"{case}.json"
    examples = read_data(recipe_of(case, 0)).evaluation
    assert examples is not None
    document = json.loads(path.read_text()) | held_out.facts(examples.columns, trained_on(case))
    rows = document.pop("rows")
    path.write_text(json.dumps({**document, "rows": rows}, indent=1) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description="Accuracy of every scorer at every budget.")
    parser.add_argument("--cases", nargs="+", choices=CASES, default=CASES)
    parser.add_argument("--scorers", nargs="+", default=SCORERS, help="methods of prune.score, also as METHOD/additive")
    parser.add_argument("--repairs", nargs="+", choices=REPAIRS, default=("none", "least-squares"))
    parser.add_argument("--budgets", nargs="+", type=float, default=BUDGETS)
    parser.add_argument("--seeds", nargs="+", type=int, default=SEEDS)
    parser.add_argument("--again", action="store_true")
    parser.add_argument("--rows-only", action="store_true", help="only count the parts of the held-out rows")
    args = parser.parse_args()
    for case in args.cases:
        if args.rows_only:
            describe_rows(case)
            continue
        measure(case, args.scorers, args.repairs, args.budgets, args.seeds, args.again)


if __name__ == "__main__":
    main()
