"""Stage `search`: find the plan."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache, partial
from typing import Any

import numpy as np
import torch
from safetensors.numpy import load_file

from optin_export import engines, repair, search
from optin_export.models import TaskModel
from optin_export.progress import phase, report
from optin_export.recipe import Budget, Target
from optin_export.search import LatencyTable
from optin_export.stages import latency_trials
from optin_export.stages.accuracy_search import (
    can_merge_if_needed,
    choose,
    may_merge_if_needed,
    shared_with_tokens,
)
from optin_export.stages.context import RunContext
from optin_export.stages.prediction import is_large, merging, prediction, warning
from optin_export.stages.results import CurvesResult, ScoringResult, SearchLog, SearchResult
from optin_export.units import Costs, Structure, reduced
from optin_export.workdir.files import read_json, regular, sha256_file, write_text

#: The latency table in the run folder.
TABLE = "plan/latency_table.json"


def find_plan(work: RunContext, scored: ScoringResult, curved: CurvesResult) -> SearchResult:
    """Find the plan, and write plan/plan.json."""
    path = work.folder / "plan" / "plan.json"
    table = _latency_table(work) if work.recipe.budget.kind == "latency" else None

    def search_it() -> tuple[search.Plan, SearchLog]:
        def built(plan: search.Plan) -> TaskModel:
            return work.operation(plan).dense

        if table is not None:
            by_table = partial(_by_table, plan_of, work.costs)
            with work.around.quiet():
                trials, budget = _trials(work), work.recipe.budget
                return latency_trials.choose(trials, table, budget, by_table, work.recipe.seed), SearchLog()
        if not work.recipe.searches_by_building:
            return plan_of(work.recipe.budget, work.costs), SearchLog()
        return choose(work.sources, work.structure, work.costs, work.least, plan_of, built)

    @cache
    def losses() -> tuple[dict[str, Any], dict[str, Any] | None]:
        measured = None if curved.path is None else load_file(regular(curved.path))
        combined = None if measured is None else repair.combined(measured, work.sources.model.output_kind)
        return load_file(regular(scored.path)), combined

    def plan_of(budget: Budget, costs: Costs, table: LatencyTable | None = None) -> search.Plan:
        scores, curves = losses()
        # Dimensions have no scores: they add nothing to the sums, and their curves say what they are worth.
        scores = scores | {one.name: np.zeros(one.count) for one in work.structure.attentions}
        found = search.find_plan(scores, costs, budget, work.steps, work.least, curves, table)
        lost = None
        if budget.kind != "latency":
            lost = search.lost_to_alignment(found, scores, costs, budget.kind, work.least, curves)
        found = _with_dimensions_apart(found, work.structure)
        return found.model_copy(update={"merged": work.scheduled[0], "alignment": _alignment(work, lost)})

    def run() -> SearchLog:
        plan, tried = search_it()
        expected = _trial(work, plan)
        plan = plan.model_copy(update={"trial": expected})
        kind = work.sources.model.output_kind
        if is_large(plan, kind) and can_merge_if_needed(work.sources, work.structure):
            phase("merging tokens instead of units", until=1.0)
            alone, unmerged = prediction(plan, kind), (plan, expected.divergence)
            merged, tried = shared_with_tokens(work.sources, work.structure, work.costs, plan_of, work.tried, unmerged)
            tried = replace(tried, alone=alone)
            if any(merged.merged):
                plan = merged.model_copy(update={"trial": _trial(work, merged)})
        write_text(path, plan.model_dump_json(indent=2) + "\n")
        return tried

    inputs = {
        "scores": sha256_file(scored.path),
        "curves": None if curved.path is None else sha256_file(curved.path),
        "costs": work.costs.to_json(),
        "budget": work.recipe.budget.model_dump(),
        "align": work.steps,
        "least": work.least,
        "merged": work.scheduled[0],
        "merge_if_needed": may_merge_if_needed(work.sources),
    }
    layer, name, more = _step(work, table)
    tried = work.cache.step(layer, name, inputs | more, [path], run, SearchLog)
    if name == "search":
        report(1, 1)
    plan = search.read_plan(path)
    if tried.alone and any(plan.merged):
        work.cache.warn(merging(plan, tried.alone, work.sources.model.output_kind))
    if (large := warning(plan, work.sources.model.output_kind)) is not None:
        work.cache.warn(large)
    return SearchResult(plan, tried)


def _with_dimensions_apart(plan: search.Plan, structure: Structure) -> search.Plan:
    """The plan of `searched_groups`, with the attentions that lose dimensions in a field of their own."""
    kept = {one.name: len(plan.groups[one.name].kept) for one in structure.attentions if plan.groups[one.heads].kept}
    fewer = {one.name: kept[one.name] for one in structure.attentions if kept.get(one.name, one.count) < one.count}
    groups = {group.key: plan.groups[group.key] for group in structure.groups}
    return plan.model_copy(update={"groups": groups, "dimensions": fewer})


def _alignment(work: RunContext, lost: float | None) -> search.PlanAlignment:
    chosen = work.recipe.alignment
    smaller = reduced(work.structure.groups, chosen)
    return search.PlanAlignment(features=chosen.features, reason=chosen.reason, smaller=smaller, lost=lost)


def _trial(work: RunContext, plan: search.Plan) -> search.PlanTrial:
    """What the plan's model loses on the rows of the loss curves, after a repair on a few others."""
    sources, prune = work.sources, work.recipe.prune
    phase("predicting the loss", until=1.0)
    references = repair.outputs_of(sources.model, work.structure, sources.curves, work.recipe.seed)
    with work.placement(sources.model):
        references.observe()
    try:
        divergence, changed = repair.judge(work.tried(plan), references, prune.temperature)
        samples = references.samples
    finally:
        references.close()
    fitted = sum(len(sources.calibration[index].rows) for index in work.trial_batches) if prune.compensate else 0
    return search.PlanTrial(fitted=fitted, judged=samples, divergence=divergence, changed=changed)


def _step(work: RunContext, table: LatencyTable | None) -> tuple[str, str, dict[str, Any]]:
    """The search that the recipe asks for: (layer whose code it depends on, name of the step, its further inputs)."""
    prune, seed = work.recipe.prune, work.recipe.seed
    trials = {
        "compensate": prune.compensate,
        "autocast": prune.autocast,
        "temperature": prune.temperature,
        "curve_samples": prune.curve_samples,
        "seed": seed,
    }
    if table is not None:
        more = {"table": sha256_file(work.folder / TABLE), "engine": _fingerprint(work)}
        return "measure", "search.latency", {**more, **work.calibration_digest, **trials}
    if work.recipe.searches_by_building:
        gauss_newton = {"temperature": prune.temperature} if work.refines else None
        return "measure", "search.accuracy", {**trials, "digest": work.digest, "gauss_newton": gauss_newton}
    return "repair", "search", {**work.calibration_digest, **trials}


def _by_table(
    plan_of: Callable[[Budget, Costs, LatencyTable], search.Plan], costs: Costs, budget: Budget, table: LatencyTable
) -> search.Plan:
    return plan_of(budget, costs, table)


def _trials(work: RunContext) -> latency_trials.LatencyTrials:
    budget = work.recipe.budget
    assert budget.batch is not None
    # In the run folder, because engines are large; in a separate folder, because they are deleted afterwards.
    folder = work.folder / "plan" / ".trials"
    target = work.recipe.budget_target
    return latency_trials.LatencyTrials(work.sources, work.structure, target, budget.batch, folder, work.scheduled[0])


def _latency_table(work: RunContext) -> LatencyTable:
    """Measure the table, or reuse the previous one if nothing that it depends on has changed."""
    path = work.folder / TABLE
    budget = work.recipe.budget

    def run() -> dict[str, Any]:
        with work.around.quiet():
            trials = _trials(work)
            table = latency_trials.measure_table(trials, work.costs, work.steps, work.least, work.recipe.seed)
        write_text(path, table.model_dump_json(indent=2) + "\n")
        return {}

    inputs = {**_fingerprint(work), "steps": work.steps, "least": work.least, "seed": work.recipe.seed}
    work.cache.step("measure", "search.table", inputs, [path], run)
    table = LatencyTable.model_validate(read_json(path))
    search.check_budget(work.costs, budget, work.least, table)
    return table


def _fingerprint(work: RunContext) -> dict[str, Any]:
    """All that an engine's latency depends on: the target and its machine, the graph's shapes, but not its weights."""
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
