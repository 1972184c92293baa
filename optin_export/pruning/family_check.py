"""Test the declarations of a family on a model: against measurement, on rebuilt models, and by counted costs."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import torch

from optin_export.errors import InputError
from optin_export.models import Inputs, TaskModel
from optin_export.pruning.counted_costs import random_half
from optin_export.pruning.rebuild import rebuild
from optin_export.pruning.verify import inexact
from optin_export.units import (
    Family,
    Structure,
    UnitGroup,
    captured,
    count_macs,
    count_params,
    discover_groups,
    find_structure,
    measure_costs,
    tensor_of,
)


@dataclass(frozen=True)
class Checked:
    """One group of units. measured: how the declaration compares with what is found by measurement. exact, costs:
    "yes", or what is wrong. passed: whether all three are right."""

    key: str
    consumer: str
    count: int
    measured: str
    exact: str
    costs: str
    passed: bool


def check_family(family: Family, model: TaskModel, inputs: Inputs) -> tuple[list[Checked], list[str]]:
    """(the result per declared group, layers whose units are found by measurement but not declared).

    inputs: two rows or more. Raises InputError if the family finds no units in the model.
    """
    structure = find_structure(model, inputs=inputs, families=[family.name], own=[family])
    try:
        found = [group for groups in discover_groups(model, inputs).blocks.values() for group in groups]
        why = None
    except InputError as error:
        found, why = [], f"not measured: {error.why}"
    by_layer = {path: group for group in found for path in group.reads}
    rows = [_checked(model, structure, group, by_layer, inputs, why) for group in structure.groups]
    declared = {path for group in structure.groups for path in group.reads}
    return rows, [f"{group.count} {group.kind} that '{group.consumer}' reads" for group in found
                  if not declared & set(group.reads)]  # fmt: skip


def _checked(
    model: TaskModel,
    structure: Structure,
    group: UnitGroup,
    found: dict[str, UnitGroup],
    inputs: Inputs,
    why: str | None,
) -> Checked:
    same = next((found[path] for path in group.reads if path in found), None)
    differs = None if same is None else _difference(group, same) or _other_stream(model, group, same, inputs)
    measured = why or ("not found" if same is None else differs or "the same")
    exact = inexact(model, structure, [group], inputs)
    costs = _wrong_costs(model, structure, group, inputs) if exact is None else "not counted"
    passed = differs is None and exact is None and costs is None
    return Checked(group.key, group.consumer, group.count, measured, exact or "yes", costs or "yes", passed)


def _difference(declared: UnitGroup, found: UnitGroup) -> str | None:
    """How two groups of the same layer differ; None if they do not."""
    if (declared.count, declared.width) != (found.count, found.width):
        return f"{found.count} units of width {found.width} rather than {declared.count} of {declared.width}"
    others = {one.path: one for one in found.producers}
    for one in declared.producers:
        other = others.get(one.path)
        if other is None:
            return f"'{one.path}' does not make them"
        for unit in range(declared.count):
            if declared.rows_of(one, [unit]) != found.rows_of(other, [unit]):
                return f"unit {unit} has other rows in '{one.path}'"
    return None


@torch.no_grad()
def _other_stream(model: TaskModel, declared: UnitGroup, found: UnitGroup, inputs: Inputs) -> str | None:
    """How the declared residual stream differs from the measured one; None if it does not, or if one is not known."""
    points: list[Any] = [declared.residual, found.residual]
    if None in points or "call" in points[0] or declared.arrange or found.arrange:
        return None
    with captured(model, points) as seen:
        model(**inputs)
    values = [[tensor_of(one) for one in seen.get(point, ())] for point in points]
    if not values[0]:
        return f"'{points[0][0]}' has no argument {points[0][1]}"
    same = all(one.shape == other.shape and torch.equal(one, other) for one, other in zip(*values, strict=False))
    return None if same else f"the residual stream is not at '{points[0][0]}' but at '{points[1][0]}'"


def _wrong_costs(model: TaskModel, structure: Structure, group: UnitGroup, inputs: Inputs) -> str | None:
    """How the predicted costs without half of the units differ from the counted ones; None if they are equal."""
    one = {name: tensor[:1] for name, tensor in inputs.items()}
    part, plan = dataclasses.replace(structure, groups=(group,)), random_half(group)
    with torch.no_grad():
        dense, _ = rebuild(model, part, {group.key: plan}, one)
        predicted, kept = measure_costs(model, part, one), {group.key: len(plan.kept)}
        counted = {"MACs": count_macs(dense, one), "parameters": count_params(dense)}
    expected = {"MACs": predicted.of("macs", kept), "parameters": predicted.of("params", kept)}
    wrong = [f"{expected[name]:,} {name}, counted {counted[name]:,}" for name in counted
             if expected[name] != counted[name]]  # fmt: skip
    return "; ".join(wrong) or None
