"""Plans by hand: which units go is not the question here."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from optin_export.search import Cost, GroupPlan, Plan
from optin_export.units import Structure


def plan_of(structure: Structure, kept: Mapping[str, Sequence[int]]) -> Plan:
    """A plan that keeps these units, and all units of groups that are not named."""
    groups = {
        group.key: GroupPlan(count=group.count, kept=tuple(kept.get(group.key, range(group.count))))
        for group in structure.groups
    }
    cost = Cost(macs=1, params=1)
    return Plan(budget={"macs": 0.5}, base=cost, predicted=cost, score_kept=1.0, optimality_gap=0.0, groups=groups)


def without(structure: Structure, removed: Mapping[str, Sequence[int]]) -> Plan:
    return plan_of(
        structure,
        {
            group.key: [unit for unit in range(group.count) if unit not in removed.get(group.key, ())]
            for group in structure.groups
        },
    )


def halved(structure: Structure, share: float = 0.5, seed: int = 0) -> Plan:
    """A random half of every group stays."""
    generator = np.random.default_rng(seed)
    kept = {
        group.key: np.sort(generator.permutation(group.count)[: max(1, int(share * group.count))]).tolist()
        for group in structure.groups
    }
    return plan_of(structure, kept)
