#!/usr/bin/env python3
"""Gradients in bfloat16 against float32: the same scores, weights of rows and loss curves, and in which time.

    python tools/studies/study_bfloat16.py                        # all models
    python tools/studies/study_bfloat16.py minilm-stsb deit-tiny  # some of them, again
    python tools/studies/render_results.py                        # the table in docs/results.md

One thread, and CPU time. Both precisions get the same probes, and the curves of both the same scores and weights.
Plans: of the scores and curves of each precision, by the same budget. Writes docs/measurements/studies/bfloat16.json;
wants a processor with instructions for bfloat16. Weights of larger models are downloaded as by study_real_models.py.
"""

from __future__ import annotations

import argparse
import os
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import torch
from accuracy_cases import recipe_of
from scipy.stats import spearmanr
from study_files import machine, save, saved_rows
from study_real_models import MODELS, ROOT

from optin_export import repair, scoring, search, units
from optin_export.data import Sources, load_sources
from optin_export.environment import multiplies_bfloat16
from optin_export.models import Placement
from optin_export.recipe import Budget, Recipe, load_recipe

NAME = "bfloat16"
CASES = ("minilm-stsb", "minilm-sst2", "deit-tiny", "mpnet-stsb")
PRECISIONS = (None, "bfloat16")
BUDGETS = (0.7, 0.5, 0.3)


def recipe(case: str, place: Path) -> Recipe:
    if case in MODELS:
        model = MODELS[case]
        return load_recipe(ROOT / "recipes" / model.recipe, ["seed=0", *model.fetched(place)])
    return recipe_of(case, 0)


def compared(sources: Sources) -> dict[str, Any]:
    """Agreement and CPU seconds of one model."""
    model, prune, seed = sources.model, sources.recipe.prune, sources.recipe.seed
    structure = units.measured(model, units.find_structure(model), sources.calibration[0].inputs)
    asked = prune.model_copy(update={"autocast": "auto"})
    _, agreement = scoring.precision_of(model, structure, sources.scoring, asked, seed, Placement())
    least = {group.key: 0 if group.sublayer is not None else 1 for group in structure.groups}
    scores, weights, curves = {}, {}, {}
    seconds: dict[str, dict[str, float]] = {}
    for dtype in PRECISIONS:
        marks = [time.process_time()]
        fixed = prune.model_copy(update={"autocast": dtype})
        scores[dtype] = scoring.score(model, structure, sources.scoring, fixed, seed).values
        marks.append(time.process_time())
        weights[dtype] = repair.sensitivities(model, structure, sources.calibration, seed, dtype)
        marks.append(time.process_time())
        curves[dtype] = repair.loss_curves(
            model,
            structure,
            scores[None],
            sources.calibration,
            sources.curves,
            repair.RepairSettings(temperature=prune.temperature, seed=seed, autocast=dtype),
            least=least,
            weights=weights[None],
        )
        marks.append(time.process_time())
        each = np.round(np.diff(marks), 1).tolist()
        seconds[dtype or "float32"] = dict(zip(("scores", "weights", "curves"), each, strict=True))
    costs = units.measure_costs(model, structure, sources.fixed(1))
    align = units.steps_of(structure.groups, sources.recipe.alignment)
    plans = {}
    for budget in BUDGETS:
        first, second = (
            search.find_plan(
                scores[one],
                costs,
                Budget(macs=budget),
                align,
                least,
                repair.combined(curves[one], model.output_kind),
            ).groups
            for one in PRECISIONS
        )
        kept = sum(len(group.kept) for group in first.values())
        common = sum(len(set(group.kept) & set(second[key].kept)) for key, group in first.items())
        plans[str(budget)] = round(1 - common / max(kept, 1), 4)
    return {
        "parameters": sum(one.numel() for one in model.parameters()),
        "agreement": round(agreement or 0.0, 5),
        "scores": _ranks([np.concatenate([scores[one][key] for key in sorted(scores[one])]) for one in PRECISIONS]),
        "weights": _ranks([_flat(weights[one]) for one in PRECISIONS]),
        "curves": {
            term: _ranks([_column(curves[one], column) for one in PRECISIONS])
            for column, term in ((1, "trajectory"), (2, "output"))
            if _column(curves[None], column).any()
        },
        "kept_otherwise": plans,
        "cpu_seconds": seconds,
    }


def _ranks(both: list[np.ndarray]) -> dict[str, float]:
    first, second = both
    off = np.abs(second - first) / np.maximum(np.abs(first), 1e-3 * np.abs(first).max())
    return {
        "rank_correlation": round(float(spearmanr(first, second).statistic), 6),
        "off": round(float(np.median(off)), 5),
    }


def _flat(weights: repair.Weights) -> np.ndarray:
    return np.concatenate([values[path].numpy() for values in weights.values for path in sorted(values)])


def _column(curves: dict[str, np.ndarray], column: int) -> np.ndarray:
    return np.concatenate([curves[key][:-1, column] for key in sorted(curves)])


def main() -> None:
    parser = argparse.ArgumentParser(description="Gradients in bfloat16 against float32.")
    parser.add_argument("cases", nargs="*", choices=[*CASES, []], default=[])
    parser.add_argument("--weights", type=Path, default=ROOT / "runs" / "real" / "weights", help="folder of downloads")
    args = parser.parse_args()
    if not multiplies_bfloat16():
        raise SystemExit("this processor has no instructions for bfloat16")
    torch.set_num_threads(1)
    for case in args.cases or CASES:
        row = {"case": case, **compared(load_sources(recipe(case, args.weights))), "machine": machine("torch")}
        row["written"] = datetime.now(UTC).strftime("%Y-%m-%d")
        print(row, flush=True)
        rows = [one for one in saved_rows(NAME) if one["case"] != case] + [row]
        save(NAME, {"rows": sorted(rows, key=lambda one: CASES.index(one["case"]))})


if __name__ == "__main__":
    main()
