"""A metric of your own: one statistic per row, and the value of any set of rows; the interval comes from resampling.

Here: how often the right digit is among the two likeliest, and how much of that a smaller model loses.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from optin_export.data import load_sources
from optin_export.measure import METRICS, Metric, evaluate, predict
from optin_export.models import as_function
from optin_export.recipe import Budget, load_recipe
from optin_export.repair import apply_plan
from optin_export.scoring import score
from optin_export.search import find_plan
from optin_export.units import find_structure, measure_costs


def among_two(outputs: np.ndarray, labels: Sequence[Any], inputs: Mapping[str, np.ndarray]) -> np.ndarray:
    """outputs [rows, classes] -> [rows], 1 where the label is one of the two largest."""
    two = np.argsort(-outputs, axis=-1)[:, :2]
    return (two == np.asarray(labels, dtype=int)[:, None]).any(-1).astype(float)


METRICS["top2"] = Metric(among_two, lambda statistics: 100 * float(statistics.mean()))

ROOT = Path(__file__).parent.parent
few = ["data.calibration.samples=128", "data.evaluation.samples=200", "prune.probes=16", "prune.score_samples=32"]
recipe = load_recipe(ROOT / "recipes" / "quickstart.yaml", few)
sources = load_sources(recipe)
model, held_out = sources.model, sources.evaluation()
assert held_out is not None
held_out = replace(held_out, metric="top2")

structure = find_structure(model)
scores = score(model, structure, sources.scoring, recipe.prune, seed=0)
steps = {group.key: group.step(8) for group in structure.groups}
plan = find_plan(scores.values, measure_costs(model, structure, sources.fixed(1)), Budget(macs=0.2), steps)
smaller = apply_plan(model, structure, plan, sources.calibration, sources.fixed(2), repair=True).dense

rows = [predict(as_function(one), held_out) for one in (model, smaller)]
found = evaluate(*rows, "top2", seed=0)
print(f"top 2: {found.base:.2f} unpruned, {found.pruned:.2f} with 20 % of the MACs")
print(f"drop {found.drop:.2f} points, 95 % interval {found.drop_low:.2f} to {found.drop_high:.2f}")
