"""What the repair is worth: the same plan carried out with and without it, on held-out images of digits.

The repair is least squares on unlabelled calibration rows, layer by layer; no gradient step is taken.
"""

from pathlib import Path

from optin_export.data import load_sources
from optin_export.measure import accuracy_of
from optin_export.models import as_function
from optin_export.recipe import Budget, load_recipe
from optin_export.repair import apply_plan
from optin_export.scoring import score
from optin_export.search import find_plan
from optin_export.units import find_structure, measure_costs

ROOT = Path(__file__).parent.parent
few = ["data.calibration.samples=128", "data.evaluation.samples=300", "prune.probes=16", "prune.score_samples=32"]
recipe = load_recipe(ROOT / "recipes" / "quickstart.yaml", few)
sources = load_sources(recipe)
model, held_out = sources.model, sources.evaluation()
assert held_out is not None

structure = find_structure(model)
scores = score(model, structure, sources.scoring, recipe.prune, seed=0)
costs = measure_costs(model, structure, sources.fixed(1))
steps = {group.key: group.step(recipe.prune.align) for group in structure.groups}
plan = find_plan(scores.values, costs, Budget(macs=0.2), steps)

print(f"unpruned:  {accuracy_of(as_function(model), held_out):.2f} % right")
points = {}
for repair in (False, True):
    done = apply_plan(model, structure, plan, sources.calibration if repair else (), sources.fixed(2), repair=repair)
    points[repair] = accuracy_of(as_function(done.dense), held_out)
    print(f"{'repaired' if repair else 'as cut'}: {points[repair]:.2f} % right")
assert points[True] > points[False]  # 80 % of the MACs are gone

for key, found in done.repairs.items():
    print(f"  {key:16} squared error on the residual stream {found.before:.3g} -> {found.after:.3g}")
