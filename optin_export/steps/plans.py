"""Stage `search`: the plan."""

from __future__ import annotations

from typing import Any

from safetensors.numpy import load_file

from optin_export import search, surgery
from optin_export.families import Costs
from optin_export.files import sha256_file, write_text
from optin_export.recipe import Budget
from optin_export.sources import TaskModel
from optin_export.steps.choice import choose
from optin_export.workspace import Facts, Workspace


def find_plan(work: Workspace, facts: Facts) -> dict[str, Any]:
    """Find the plan, write plan/plan.json; returns what was tried to find it."""
    path = work.folder / "plan" / "plan.json"
    scores_path, curves_path = (work.folder / "scores" / f"{name}.safetensors" for name in ("scores", "curves"))
    prune = work.recipe.prune
    joint = prune.allocation == "joint"
    align = {group.key: group.step(prune.align) for group in work.structure.groups}

    def run() -> dict[str, Any]:
        scores = load_file(scores_path)
        curves = surgery.combined(load_file(curves_path), work.sources.model.output_kind) if joint else None

        def plan_of(budget: Budget, costs: Costs) -> search.Plan:
            found = search.find_plan(scores, costs, budget, align, work.least, curves)
            return found.model_copy(update={"merged": work.scheduled[0]})

        def built(plan: search.Plan) -> TaskModel:
            return work.operation(plan, lambda done, total: None).dense

        plan, tried = choose(work.sources, work.structure, work.costs, work.least, plan_of, built, work.tick)
        write_text(path, plan.model_dump_json(indent=2) + "\n")
        return tried

    inputs: dict[str, Any] = {
        "scores": sha256_file(scores_path),
        "curves": sha256_file(curves_path) if joint else None,
        "costs": work.costs.to_json(),
        "budget": prune.budget.model_dump(),
        "align": align,
        "least": work.least,
        "merged": work.scheduled[0],
    }
    if prune.budget.accuracy_drop is not None or work.recipe.tokens.keep == "auto":
        inputs |= {"digest": work.digest, "compensate": prune.compensate, "seed": work.recipe.seed}
        return work.ledger.step("measure", "search.accuracy", inputs, [path], run)
    return work.ledger.step("search", "search", inputs, [path], run)
