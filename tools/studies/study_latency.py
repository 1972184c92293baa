#!/usr/bin/env python3
"""Does a plan found by measured latency keep more accuracy than one found by MACs, at equal measured latency?

    python tools/studies/study_latency.py --cases vit-cifar10 minilm-stsb --speedups 1.5 2 2.5

Scores and loss curves are the same for both; only what the knapsack adds up differs. For every speedup the latency
table gives one plan. Around the MACs budget that the table takes for equally fast, five MACs plans are built as engines
and timed beside it, and the budget of equal latency is interpolated: its plan is the opponent. Both are repaired,
evaluated, built and timed once more, interleaved with the unpruned engine in one process; the result has that
measurement, so that it shows how equal they are. Timing runs in processes of its own: `--timer 'taskset -c 0'` puts a
command before them.
Writes docs/measurements/studies/latency.json, one row per case and speedup.
"""

from __future__ import annotations

import argparse
import json
import shlex
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from benchmark_accuracy import CASES, Bench, recipe_of
from study_files import machine, save, saved_rows
from study_fusion import speedup_of

from optin_export import engines, measure, pruning, search
from optin_export.data import load_sources
from optin_export.export import export_onnx
from optin_export.models import TaskModel
from optin_export.recipe import Budget, Target
from optin_export.search import LatencyTable, Plan
from optin_export.stages import latency_trials
from optin_export.units import steps_of

NAME = "latency"
TARGET = Target()  # onnxruntime, one CPU thread
#: MACs budgets tried, relative to the one that the table takes for equally fast.
AROUND = (0.9, 0.95, 1.0, 1.05, 1.1)
BLOCKS = 24


class Study:
    """One case: its scores, curves and latency table, and a folder for the engines of one timing."""

    def __init__(self, case: str, seed: int, batch: int, timer: list[str], folder: Path) -> None:
        self.case, self.seed, self.batch, self.timer, self.folder = case, seed, batch, timer, folder
        self.bench = Bench(load_sources(recipe_of(case, seed)))
        self.align = steps_of(self.bench.structure.groups, self.bench.sources.recipe.alignment)
        self._write_inputs()
        self.table = self._table()
        self.scores, _ = self.bench.score("optin")
        self.curves = self.bench.curves(self.scores)

    def _write_inputs(self) -> None:
        rows = self.bench.sources.fixed(self.batch)
        np.savez(self.folder / "inputs.npz", **{name: tensor.numpy() for name, tensor in rows.items()})

    def _table(self) -> LatencyTable:
        self._time("--table", self.case, str(self.seed), str(self.batch))
        return LatencyTable.model_validate_json((self.folder / "table.json").read_text())

    def _time(self, *what: str) -> None:
        subprocess.run([*self.timer, sys.executable, __file__, "--folder", str(self.folder), *what], check=True)

    def plan(self, budget: Budget) -> Plan:
        bench = self.bench
        return search.find_plan(
            self.scores.values, bench.costs, budget, self.align, bench.least, self.curves, self.table
        )

    def promised(self, plan: Plan) -> float:
        """Milliseconds by the table."""
        return self.table.of({key: len(group.kept) for key, group in plan.groups.items()}) / 1e6

    def equally_promised(self, milliseconds: float) -> float:
        """The MACs budget whose plan the table takes for as fast, by bisection."""
        low, high = 0.02, 1.0
        for _ in range(12):
            middle = (low + high) / 2
            try:
                fits = self.promised(self.plan(Budget(macs=middle))) <= milliseconds
            except Exception as error:  # below what may stay
                if "no plan meets" not in str(error):
                    raise
                fits = True
            low, high = (middle, high) if fits else (low, middle)
        return low

    def shaped(self, plan: Plan) -> TaskModel:
        inputs = self.bench.sources.fixed(2)
        return pruning.rebuild(self.bench.model, self.bench.structure, plan.groups, inputs)[0]

    def timed(self, models: dict[str, TaskModel]) -> measure.Interleaved:
        """Engines of these models, and of the unpruned one, interleaved in a process of its own."""
        recipe = self.bench.sources.recipe
        for name, model in {"base": self.bench.model, **models}.items():
            onnx = self.folder / f"{name}.graph"
            sequence = recipe.export.sequence if recipe.is_text else None
            export_onnx(model, self.bench.sources.fixed(2), onnx, max_batch=max(self.batch, 2), sequence=sequence)
            engines.build(onnx, TARGET, self.folder / f"{name}.engine.onnx")
            onnx.unlink()
        self._time("--engines", "base", *models)
        for name in ("base", *models):
            (self.folder / f"{name}.engine.onnx").unlink()
        return measure.Interleaved(json.loads((self.folder / "samples.json").read_text()), self.seed)

    def row(self, speedup: float) -> dict[str, Any]:
        by_latency = self.plan(Budget(speedup=speedup))
        centre = self.equally_promised(self.promised(by_latency))
        budgets = [round(min(centre * factor, 1.0), 5) for factor in AROUND]
        others = {f"macs{index}": self.shaped(self.plan(Budget(macs=one))) for index, one in enumerate(budgets)}
        found = self.timed({"latency": self.shaped(by_latency), **others})
        ratios = [speedup_of(found, name, "latency").median for name in others]  # above 1: faster than the latency plan
        equal = float(np.interp(-1.0, -np.maximum.accumulate(ratios[::-1])[::-1], budgets))
        by_macs = self.plan(Budget(macs=equal))
        models, judged = {}, {}
        for name, plan in (("latency", by_latency), ("macs", by_macs)):
            models[name], _ = self.bench.apply_plan(plan, "least-squares")
            judged[name] = self.bench.judged(models[name])
        found = self.timed(models)
        plans = {"latency": by_latency, "macs": by_macs}
        return {
            "asked": speedup,
            "base_ms": round(found.median("base").median, 4),
            **{key: judged["latency"][key] for key in ("half", "base")},
            "metric": self.bench.evaluation.metric,
            # How many times faster the latency plan's engine is than the MACs plan's: 1 is equal.
            "latency_over_macs": _speedup(found, "latency", "macs"),
            "promised": round(self.table.base_ns / 1e6 / self.promised(by_latency), 4),
            **{
                name: {
                    "drop": judged[name]["drop"],
                    "speedup": _speedup(found, name, "base"),
                    "ms": round(found.median(name).median, 4),
                    "macs": round(plan.predicted.macs / plan.base.macs, 4),
                    "params": round(plan.predicted.params / plan.base.params, 4),
                    "kept": {key: len(group.kept) for key, group in plan.groups.items()},
                }
                for name, plan in plans.items()
            },
        }


def _speedup(found: measure.Interleaved, name: str, against: str) -> dict[str, float]:
    one = speedup_of(found, name, against)
    return {"median": round(one.median, 4), "low": round(one.ci_low, 4), "high": round(one.ci_high, 4)}


def measure_table(folder: Path, case: str, seed: int, batch: int) -> None:
    """Write table.json."""
    bench = Bench(load_sources(recipe_of(case, seed)))
    align = steps_of(bench.structure.groups, bench.sources.recipe.alignment)
    trial = latency_trials.LatencyTrials(bench.sources, bench.structure, TARGET, batch, folder / "trials")
    table = latency_trials.measure_table(trial, bench.costs, align, bench.least, seed)
    (folder / "table.json").write_text(table.model_dump_json(indent=1))


def time_engines(folder: Path, names: list[str]) -> None:
    """Write samples.json."""
    with np.load(folder / "inputs.npz") as stored:
        inputs = dict(stored)
    built = {name: engines.load(folder / f"{name}.engine.onnx", TARGET) for name in names}
    found = measure.interleave(built, inputs, blocks=BLOCKS, seed=0)
    (folder / "samples.json").write_text(json.dumps(found.samples))


def main() -> None:
    parser = argparse.ArgumentParser(description="Plans by measured latency against plans by MACs.")
    parser.add_argument("--cases", nargs="+", choices=CASES, default=("vit-cifar10", "minilm-stsb"))
    parser.add_argument("--speedups", nargs="+", type=float, default=(1.5, 2.0, 2.5))
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--timer", default="", help="command before every process that times")
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--table", nargs=3, help=argparse.SUPPRESS)
    parser.add_argument("--engines", nargs="+", help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.table:
        return measure_table(args.folder, args.table[0], int(args.table[1]), int(args.table[2]))
    if args.engines:
        return time_engines(args.folder, args.engines)
    rows = saved_rows(NAME)
    for case in args.cases:
        folder = Path(tempfile.mkdtemp(prefix="study-latency-"))
        try:
            study = Study(case, args.seed, args.batch, shlex.split(args.timer), folder)
            for speedup in args.speedups:
                key = {"case": case, "batch": args.batch, "seed": args.seed, "asked": speedup}
                row = {**key, **study.row(speedup)}
                rows = [old for old in rows if any(old[name] != value for name, value in key.items())] + [row]
                print(row, flush=True)
                versions = machine("onnxruntime", "torch")
                save(NAME, {"cpu": versions.pop("cpu"), "target": TARGET.name, "versions": versions, "rows": rows})
        finally:
            shutil.rmtree(folder, ignore_errors=True)
    return None


if __name__ == "__main__":
    main()
