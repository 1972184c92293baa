#!/usr/bin/env python3
"""Accuracy against measured latency of heads and neurons alone (beta), with merged tokens (tau), and of tokens alone.

    python tools/studies/study_tokens.py --cases quickstart cifar_vit \\
        --set data.calibration.samples=384 prune.curve_samples=128 prune.probes=16

Writes docs/measurements/studies/tokens.json, one row per case, way and budget: points on the half of the held-out rows
that may choose, and the ratio of the unpruned onnxruntime engine's latency to that engine's, both measured in turn.
"""

from __future__ import annotations

import argparse
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import held_out
import torch
from study_files import machine, save, saved_rows

from optin_export import engines, measure, pruning, repair, scoring, search
from optin_export.data import load_sources
from optin_export.export import export_onnx
from optin_export.measure.latency import LatencySettings, measure_latency
from optin_export.models import TaskModel, as_function
from optin_export.recipe import Budget, Recipe, load_recipe
from optin_export.units import count_macs, find_structure, find_tokens, measure_costs, steps_of

ROOT = Path(__file__).resolve().parents[2]
NAME = "tokens"
CASES = ("quickstart", "cifar_vit")
WAYS = ("beta", "tau", "tokens")


class Study:
    """One recipe, its unpruned engine, and what every way shares: scores, loss curves, sensitivities."""

    def __init__(self, recipe: Recipe, folder: Path, batch: int) -> None:
        self.recipe, self.folder, self.batch = recipe, folder, batch
        self.sources = load_sources(recipe)
        self.model, self.one = self.sources.model, self.sources.fixed(1)
        self.structure = find_structure(self.model).only(recipe.prune.units)
        self.tokens = find_tokens(self.model)
        self.costs = measure_costs(self.model, self.structure, self.one)
        self.held_out, examples = self.sources.evaluation(), self.sources.evaluation_examples
        assert self.held_out is not None and examples is not None
        self.rows = held_out.parts(examples.columns)[held_out.CHOOSE]
        self.weights = repair.sensitivities(self.model, self.structure, self.sources.calibration, recipe.seed)
        self.scores = scoring.score(self.model, self.structure, self.sources.scoring, recipe.prune, recipe.seed).values
        self.least = {group.key: 0 if group.sublayer else 1 for group in self.structure.groups}
        curves = repair.loss_curves(
            self.model,
            self.structure,
            self.scores,
            self.sources.calibration,
            self.sources.curves,
            repair.RepairSettings(temperature=recipe.prune.temperature, seed=recipe.seed),
            least=self.least,
            weights=self.weights,
        )
        self.curves = repair.combined(curves, self.model.output_kind)
        self.base = self._engine(self.model, "base")
        self.base_statistics = measure.predict(as_function(self.model), self.held_out)

    def plan(self, macs: float, costs: Any) -> search.Plan:
        align = steps_of(self.structure.groups, self.recipe.alignment)
        return search.find_plan(self.scores, costs, Budget(macs=macs), align, self.least, self.curves)

    def built(self, plan: search.Plan) -> TaskModel:
        return repair.apply_plan(
            self.model,
            self.structure,
            plan,
            self.sources.calibration,
            self.sources.fixed(2),
            repair.RepairSettings(seed=self.recipe.seed),
            weights=self.weights,
        ).dense

    def chosen(self, way: str, macs: float) -> search.Plan:
        """beta: units alone. tau: units and tokens share the budget. tokens: the fewest merged that meet it."""
        if way == "beta":
            return self.plan(macs, self.costs)
        if way == "tau":
            return repair.share_budget(
                self.model,
                self.structure,
                self.one,
                self.costs,
                self.sources.curves,
                lambda costs: self.plan(macs, costs),
                self.built,
                temperature=self.recipe.prune.temperature,
                seed=self.recipe.seed,
            )[0]
        count = pruning.count_tokens(self.model, self.structure, self.one)
        every = self.plan(1.0, self.costs)
        for percent in range(100, 20, -1):
            merged = search.spread_merging(percent / 100, count, self.tokens.prefix, len(self.structure.blocks))
            model = pruning.insert_merging(self.model, self.structure, self.tokens, merged)
            if count_macs(model, self.one) <= macs * self.costs.macs:
                return every.model_copy(update={"merged": merged})
        raise SystemExit(f"merging tokens alone does not reach {macs:g} of the MACs")

    def row(self, way: str, macs: float) -> dict[str, Any]:
        plan = self.chosen(way, macs)
        model = self.built(plan)
        assert self.held_out is not None
        statistics = measure.predict(as_function(model), self.held_out)
        inputs = {name: tensor.numpy() for name, tensor in self.sources.fixed(self.batch).items()}
        settings = LatencySettings("onnxruntime-cpu-1t", self.batch, None, self.recipe.seed)
        timed = measure_latency(self.base, self._engine(model, f"{way}-{macs}"), inputs, settings)
        return {
            "macs": round(count_macs(model, self.one) / self.costs.macs, 4),
            "merged": list(plan.merged),
            **held_out.judged(self.base_statistics, statistics, self.held_out.metric, self.rows),
            "calibration_rows": len(self.sources.calibration_examples),
            "batch": self.batch,
            "base_ms": round(timed.base_ms.p50, 4),
            "speedup": [
                round(value, 3) for value in (timed.speedup.median, timed.speedup.ci_low, timed.speedup.ci_high)
            ],
            "noise_floor": round(timed.noise_floor, 3),
        }

    def _engine(self, model: TaskModel, name: str) -> Any:
        target, path = self.recipe.targets[0], self.folder / f"{name}.onnx"
        export_onnx(model, self.sources.fixed(2), path, max_batch=max(self.recipe.export.batch), sequence=None)
        engines.build(path, target, self.folder / f"{name}.engine.onnx")
        return partial(engines.load, self.folder / f"{name}.engine.onnx", target)


def main() -> None:
    parser = argparse.ArgumentParser(description="Accuracy against latency, with and without merged tokens.")
    parser.add_argument("--cases", nargs="+", choices=CASES, default=CASES)
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=WAYS)
    parser.add_argument("--budgets", nargs="+", type=float, default=(0.7, 0.5))
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--set", nargs="*", default=[], help="overrides of the recipe, as on the command line")
    args = parser.parse_args()
    torch.set_num_threads(1)
    rows = saved_rows(NAME)
    for case in args.cases:
        recipe = load_recipe(ROOT / "recipes" / f"{case}.yaml", args.set)
        with tempfile.TemporaryDirectory() as folder:
            study = Study(recipe, Path(folder), args.batch)
            for budget in args.budgets:
                for way in args.ways:
                    key = {"case": case, "way": way, "budget": budget}
                    rows = [old for old in rows if any(old[name] != value for name, value in key.items())]
                    rows.append({**key, **study.row(way, budget)})
                    print(rows[-1], flush=True)
                    rows.sort(key=lambda row: (row["case"], -row["budget"], WAYS.index(row["way"])))
                    save(NAME, {**machine(), "rows": rows})


if __name__ == "__main__":
    main()
