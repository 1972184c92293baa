"""Plans that are chosen in rounds: some units leave, the repaired model is scored again, more units leave."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping

import numpy as np

from optin_export import pruning, repair, scoring, search, units
from optin_export.data import Sources
from optin_export.models import TaskModel
from optin_export.recipe import Budget
from optin_export.search import Cost, GroupPlan, Plan
from optin_export.units import Costs, Structure

Tick = Callable[[int, int], None]


def choose_in_rounds(
    sources: Sources,
    structure: Structure,
    costs: Costs,
    least: Mapping[str, int],
    scores: Mapping[str, np.ndarray],
    curves: Mapping[str, np.ndarray] | None,
    weights: repair.Weights | None,
    tick: Tick = lambda done, total: None,
) -> Plan:
    """The plan on the unpruned model after `prune.rounds` rounds; round i of r goes to the budget f^(i/r).

    scores: of the unpruned model. curves: its measured loss curves (both terms), None with `allocation: additive`.
    weights: its sensitivities, where there is a repair. Between rounds the model is rebuilt from the unpruned one and
    repaired towards it, so rounds decide only which units stay.
    """
    prune, budget = sources.recipe.prune, sources.recipe.budget
    kind, rounds = budget.kind, prune.rounds
    assert kind != "latency"
    model, now, spent = sources.model, structure, costs
    kept = {group.key: np.arange(group.count) for group in structure.groups}
    first = scores
    for turn in range(1, rounds + 1):
        if turn > 1:
            groups = _groups(structure, kept)
            model, smaller = pruning.rebuild(sources.model, structure, groups, sources.fixed(2))
            if prune.compensate:
                repair.compensate(
                    sources.model,
                    model,
                    structure,
                    smaller,
                    groups,
                    sources.calibration,
                    only_scale=prune.compensate == "rescale",
                    weights=weights,
                    seed=sources.recipe.seed,
                )
            now = dataclasses.replace(smaller, groups=tuple(group for group in smaller.groups if group.count))
            spent = units.measure_costs(model, now, sources.fixed(1))
            scores, curves = _judge(sources, model, now, least, curves is not None)
        share = budget.fraction ** (turn / rounds) * costs.whole(kind) / spent.whole(kind)
        keys = [group.key for group in now.groups]
        plan = search.find_plan(
            {key: scores[key] for key in keys},
            spent,
            Budget(**{kind: min(1.0, share)}),
            {group.key: group.step(prune.align) for group in now.groups},
            {group.key: min(least[group.key], group.count) for group in now.groups},
            None if curves is None else repair.combined(curves, model.output_kind),
        )
        for key in keys:
            kept[key] = kept[key][list(plan.groups[key].kept)]
        tick(turn, rounds)
    return _plan(structure, costs, budget, kept, first, rounds)


def _judge(
    sources: Sources, model: TaskModel, structure: Structure, least: Mapping[str, int], joint: bool
) -> tuple[Mapping[str, np.ndarray], Mapping[str, np.ndarray] | None]:
    """Scores and loss curves of the model as it is by now."""
    prune, seed = sources.recipe.prune, sources.recipe.seed
    scores = scoring.score(model, structure, sources.scoring, prune, seed).values
    if not joint:
        return scores, None
    curves = repair.loss_curves(
        model,
        structure,
        scores,
        sources.calibration,
        sources.curves,
        least={group.key: min(least[group.key], group.count) for group in structure.groups},
        temperature=prune.temperature,
        repair=prune.compensate,
        weights=repair.sensitivities(model, structure, sources.calibration, seed) if prune.compensate else None,
        seed=seed,
    )
    return scores, curves


def _groups(structure: Structure, kept: Mapping[str, np.ndarray]) -> dict[str, GroupPlan]:
    return {
        group.key: GroupPlan(count=group.count, kept=tuple(int(unit) for unit in kept[group.key]))
        for group in structure.groups
    }


def _plan(
    structure: Structure,
    costs: Costs,
    budget: Budget,
    kept: Mapping[str, np.ndarray],
    scores: Mapping[str, np.ndarray],
    rounds: int,
) -> Plan:
    """What was kept, told of the unpruned model; no bound and no loss, because every round had curves of its own."""
    counts = {key: len(units) for key, units in kept.items()}
    total = sum(float(scores[key].sum()) for key in kept)
    held = sum(float(scores[key][units].sum()) for key, units in kept.items())
    return Plan(
        budget={budget.kind: budget.fraction},
        base=Cost(macs=costs.whole("macs"), params=costs.params),
        predicted=Cost(macs=costs.of("macs", counts), params=costs.of("params", counts)),
        score_kept=held / total if total > 0 else 1.0,
        optimality_gap=None,
        groups=_groups(structure, kept),
        rounds=rounds,
    )
