"""The MACs that units save outside of their layers: what is predicted is compared with what the rebuilt model needs."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch

from optin_export.models import Inputs, TaskModel
from optin_export.pruning.rebuild import rebuild
from optin_export.search import GroupPlan
from optin_export.units import Structure, UnitGroup, count_macs, measure_costs


def random_half(group: UnitGroup) -> GroupPlan:
    """A random half of the units."""
    generator = torch.Generator().manual_seed(group.count)
    order = torch.randperm(group.count, generator=generator)[: max(1, group.count // 2)]
    return GroupPlan(count=group.count, kept=tuple(sorted(order.tolist())))


def with_costs(model: TaskModel, structure: Structure, inputs: Inputs) -> Structure:
    """The structure with `outside` for every found group whose predicted MACs are not those of the rebuilt model.

    inputs: at the shape at which costs are counted. All groups are counted at once, and each alone only if that
    differs, in halves down to single groups.
    """
    one = {name: tensor[:1] for name, tensor in inputs.items()}
    found = [group for group in structure.groups if group.found]
    changed = {group.key: group for group in _with_outside(model, structure, found, one)}
    return dataclasses.replace(structure, groups=tuple(changed.get(group.key, group) for group in structure.groups))


def _with_outside(model: TaskModel, structure: Structure, groups: Sequence[UnitGroup], one: Inputs) -> list[UnitGroup]:
    part, plans = dataclasses.replace(structure, groups=tuple(groups)), {one.key: random_half(one) for one in groups}
    counted = count_macs(rebuild(model, part, plans, one)[0], one)
    kept = {key: len(plan.kept) for key, plan in plans.items()}
    if measure_costs(model, part, one).of("macs", kept) == counted:
        return list(groups)
    if len(groups) > 1:
        half = len(groups) // 2
        return [*_with_outside(model, structure, groups[:half], one),
                *_with_outside(model, structure, groups[half:], one)]  # fmt: skip
    bare = dataclasses.replace(groups[0], outside=0)
    predicted = measure_costs(model, dataclasses.replace(part, groups=(bare,)), one).of("macs", kept)
    return [dataclasses.replace(bare, outside=round((predicted - counted) / (bare.count - kept[bare.key])))]
