"""Results of a cluster's nodes as gates of the run, and the cost of their work."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from optin_export.measure import Gate
from optin_export.recipe import Recipe, Target
from optin_export.report.elsewhere import still_elsewhere
from optin_export.report.schema import MachineResult, StageCost
from optin_export.workdir.files import read_json

#: File of reasons why targets were not measured, {"unmeasured": {target: reason}}.
FLEET = "cluster/fleet.json"
#: File of {stage: cost}, written by `distributed`.
COSTS = "cluster/costs.json"


def costs_of(run: Path) -> dict[str, dict[str, Any]]:
    """{stage: cost}; empty if no work was done on workers."""
    try:
        return dict(read_json(run / COSTS))
    except (OSError, ValueError, TypeError):
        return {}


def still_spent(run: Path) -> tuple[StageCost, ...]:
    """Costs of stages on a cluster's workers, from the run folder; empty if they cannot be read."""
    try:
        return tuple(StageCost(stage=name, **cost) for name, cost in costs_of(run).items())
    except (ValueError, TypeError):
        return ()


def fleet_gates(recipe: Recipe, run: Path) -> list[Gate]:
    """ "target.NAME" for each of the recipe's targets with resources: all of its own gates hold on the node that has
    them. One that has not been measured, on the run's very graphs, has not passed, and says which label is missing."""
    results = {one.target: one for one in sorted(still_elsewhere(run), key=lambda one: one.created)}
    try:
        reasons = dict(read_json(run / FLEET)["unmeasured"])
    except (OSError, ValueError, KeyError, TypeError):
        reasons = {}
    return [_gate(target, results.get(target.name), reasons.get(target.name)) for target in recipe.fleet]


def _gate(target: Target, found: MachineResult | None, reason: str | None) -> Gate:
    name = f"target.{target.name}"
    if found is None or any(engine.unmeasured for engine in found.engines):
        needs = ", ".join(target.resources)
        why = reason or f"it needs a node with {needs}: run with --cluster"
        if found is not None:
            why = next(engine.unmeasured for engine in found.engines if engine.unmeasured) + f" on {found.machine}"
        return Gate(name, "gate", ">=", 1.0, None, False, f"not evaluated: {why}")
    passed = sum(gate.passed for gate in found.gates)
    details = "; ".join(
        f"{gate.name} {'not evaluated' if gate.measured is None else f'{gate.measured:.4g}'} "
        f"({gate.relation} {gate.required:g})"
        for gate in found.gates
    )
    wrong = any(gate.kind == "parity" and not gate.passed for gate in found.gates)
    kind: Literal["parity", "gate"] = "parity" if wrong else "gate"
    note = f"gates on {found.machine}: {details}"
    return Gate(name, kind, ">=", float(len(found.gates)), float(passed), passed == len(found.gates) > 0, note)
