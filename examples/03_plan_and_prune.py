"""From the model and data of a recipe to a smaller dense model, one step at a time, without a run folder."""

from pathlib import Path

import torch

from optin_export.data import load_sources
from optin_export.recipe import Budget, load_recipe
from optin_export.repair import apply_plan
from optin_export.scoring import score
from optin_export.search import find_plan
from optin_export.units import count_macs, count_params, find_structure, measure_costs

ROOT = Path(__file__).parent.parent
few = ["data.calibration.samples=64", "prune.probes=16", "prune.score_samples=32"]
recipe = load_recipe(ROOT / "recipes" / "quickstart.yaml", few)
sources = load_sources(recipe)
model, one = sources.model, sources.fixed(1)  # one real row at the shipped shape

structure = find_structure(model)
scores = score(model, structure, sources.scoring, recipe.prune, seed=0)
costs = measure_costs(model, structure, one)  # what each unit costs, and what no unit can save
steps = {group.key: group.step(recipe.prune.align) for group in structure.groups}

for share in (0.8, 0.5):
    plan = find_plan(scores.values, costs, Budget(macs=share), steps)
    smaller = apply_plan(model, structure, plan, (), sources.fixed(2), repair=False).dense
    assert count_macs(smaller, one) == plan.predicted.macs <= share * plan.base.macs
    print(f"at most {share:.0%} of the MACs: {count_macs(smaller, one):,} left of {count_macs(model, one):,}")
    print(f"  parameters: {count_params(smaller):,} left of {count_params(model):,}")
    print("  kept:", {key: f"{len(group.kept)}/{group.count}" for key, group in plan.groups.items()})
    with torch.no_grad():
        print("  output:", tuple(smaller(**sources.fixed(4)).shape))
