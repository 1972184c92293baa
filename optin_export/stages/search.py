"""Stage `search`: the plan."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from safetensors.numpy import load_file

from optin_export import engines, repair, search
from optin_export.models import TaskModel
from optin_export.progress import report
from optin_export.recipe import Budget, Target
from optin_export.search import LatencyTable
from optin_export.stages import latency_trials
from optin_export.stages.accuracy_search import choose
from optin_export.stages.context import Facts, RunContext
from optin_export.stages.rounds import choose_in_rounds
from optin_export.units import Costs
from optin_export.workdir.files import read_json, regular, sha256_file, write_text

#: The latency table in the run folder.
TABLE = "plan/latency_table.json"


def find_plan(work: RunContext, facts: Facts) -> dict[str, Any]:
    """Find the plan, write plan/plan.json; returns what was tried to find it."""
    path = work.folder / "plan" / "plan.json"
    scores_path, curves_path = (work.folder / "scores" / f"{name}.safetensors" for name in ("scores", "curves"))
    prune = work.recipe.prune
    joint = prune.allocation == "joint"
    align = {group.key: group.step(prune.align) for group in work.structure.groups}

    table = _latency_table(work, align) if prune.budget.kind == "latency" else None

    def search_it() -> tuple[search.Plan, dict[str, Any]]:
        scores, measured = load_file(regular(scores_path)), load_file(regular(curves_path)) if joint else None
        curves = None if measured is None else repair.combined(measured, work.sources.model.output_kind)

        def plan_of(budget: Budget, costs: Costs, table: LatencyTable | None = None) -> search.Plan:
            found = search.find_plan(scores, costs, budget, align, work.least, curves, table)
            return found.model_copy(update={"merged": work.scheduled[0]})

        def built(plan: search.Plan) -> TaskModel:
            return work.operation(plan).dense

        if table is not None:
            by_table = partial(_by_table, plan_of, work.costs)
            with work.around.quiet():
                return latency_trials.choose(_trials(work), table, work.recipe.budget, by_table, work.recipe.seed), {}
        if prune.rounds > 1:
            weights = work.sensitivities if prune.compensate else None
            given = (work.sources, work.structure, work.costs, work.least, scores, measured, weights)
            return choose_in_rounds(*given), {}
        return choose(work.sources, work.structure, work.costs, work.least, plan_of, built)

    def run() -> dict[str, Any]:
        plan, tried = search_it()
        write_text(path, plan.model_dump_json(indent=2) + "\n")
        return tried

    inputs: dict[str, Any] = {
        "scores": sha256_file(scores_path),
        "curves": sha256_file(curves_path) if joint else None,
        "costs": work.costs.to_json(),
        "budget": work.recipe.budget.model_dump(),
        "align": align,
        "least": work.least,
        "merged": work.scheduled[0],
    }
    if table is not None:
        inputs |= {"table": sha256_file(work.folder / TABLE), "engine": _fingerprint(work)}
        return work.cache.step("measure", "search.latency", inputs, [path], run)
    if prune.budget.accuracy_drop is not None or work.recipe.tokens.keep == "auto":
        inputs |= {"digest": work.digest, "compensate": prune.compensate, "seed": work.recipe.seed}
        inputs |= {"gauss_newton": {"temperature": prune.temperature} if work.refines else None}
        return work.cache.step("measure", "search.accuracy", inputs, [path], run)
    if prune.rounds > 1:
        again = prune.model_dump(mode="json", exclude={"budget"})
        inputs |= {**work.calibration_digest, "prune": again, "seed": work.recipe.seed}
        return work.cache.step("repair", "search.rounds", inputs, [path], run)
    found = work.cache.step("search", "search", inputs, [path], run)
    report(1, 1)
    return found


def _by_table(
    plan_of: Callable[[Budget, Costs, LatencyTable], search.Plan], costs: Costs, budget: Budget, table: LatencyTable
) -> search.Plan:
    return plan_of(budget, costs, table)


def _trials(work: RunContext) -> latency_trials.LatencyTrials:
    budget = work.recipe.budget
    assert budget.batch is not None
    # In the run folder, because engines are large; a folder of their own, because they are gone afterwards.
    folder = work.folder / "plan" / ".trials"
    target = work.recipe.budget_target
    return latency_trials.LatencyTrials(work.sources, work.structure, target, budget.batch, folder, work.scheduled[0])


def _latency_table(work: RunContext, steps: dict[str, int]) -> LatencyTable:
    """Measure the table, or take that of before if nothing that it depends on has changed."""
    path = work.folder / TABLE
    budget = work.recipe.budget

    def run() -> dict[str, Any]:
        with work.around.quiet():
            trials = _trials(work)
            table = latency_trials.measure_table(trials, work.costs, steps, work.least, work.recipe.seed)
        write_text(path, table.model_dump_json(indent=2) + "\n")
        return {}

    inputs = {**_fingerprint(work), "steps": steps, "least": work.least, "seed": work.recipe.seed}
    work.cache.step("measure", "search.table", inputs, [path], run)
    table = LatencyTable.model_validate(read_json(path))
    search.check_budget(work.costs, budget, work.least, table)
    return table


def _fingerprint(work: RunContext) -> dict[str, Any]:
    """What an engine's latency depends on: the target and its machine, the graph's shapes, not its weights."""
    target, export = work.recipe.budget_target, work.recipe.export
    return {
        "target": target.model_dump(mode="json"),
        "versions": engines.versions(target),
        "device": _device(work, target),
        "architecture": work.digest["architecture"],
        "units": work.costs.to_json(),
        "merged": work.scheduled[0],
        "export": export.model_dump(mode="json"),
        "batch": work.recipe.budget.batch,
        "shapes": work.sources.shapes(),
        "torch": torch.__version__,
    }


def _device(work: RunContext, target: Target) -> str:
    if target.device == "cuda" and torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return str(work.environment["cpu"])
