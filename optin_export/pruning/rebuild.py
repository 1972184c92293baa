"""Rebuild a model densely by a plan: torch-pruning's dependency graph with explicit indices, sub-layers dropped."""

from __future__ import annotations

import bisect
import copy
import dataclasses
import warnings
from collections import OrderedDict, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeVar

import torch
import torch_pruning
from torch import nn

from optin_export.errors import InputError
from optin_export.models import Inputs, TaskModel
from optin_export.pruning.code_sizes import is_code_size, replace_size
from optin_export.pruning.grouped_rows import ROWS as ROWS_OF_GROUPS
from optin_export.pruning.grouped_rows import cut_rows_of_groups
from optin_export.search import GroupPlan
from optin_export.units import (
    SELECTED_HEADS,
    Structure,
    UnitGroup,
    get_layer,
    get_module,
    get_weight,
    reset_caches,
    select_heads,
    set_module,
)

Module = TypeVar("Module", bound=nn.Module)


class Constant(nn.Module):
    """Replaces a sub-layer without units: returns its bias for any input. bias: [hidden].

    expands: repeat the bias at every position of the input.
    """

    def __init__(self, bias: torch.Tensor, returns_tuple: bool, expands: bool = False) -> None:
        super().__init__()
        self.bias = nn.Parameter(bias, requires_grad=False)
        self.returns_tuple, self.expands = returns_tuple, expands

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        output = self.bias.expand(*args[0].shape[:-1], -1) if self.expands else self.bias
        return (output, None) if self.returns_tuple else output


class Passthrough(nn.Module):
    """Replaces a module whose output is no longer used: returns its first argument."""

    def __init__(self, returns_tuple: bool) -> None:
        super().__init__()
        self.returns_tuple = returns_tuple

    def forward(self, first: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        return (first, None) if self.returns_tuple else first


def rebuild(
    model: TaskModel, structure: Structure, groups: Mapping[str, GroupPlan], inputs: Inputs
) -> tuple[TaskModel, Structure]:
    """A dense copy of `model` with only the kept units, and its structure (group counts updated, empty groups kept).

    inputs: any valid inputs, to trace the dependency graph. The masked original and the result are equal up to float
    rounding. Raises InputError if the plan is not for this model.
    """
    _check(structure, groups)
    dense = copied(model)
    reset_caches(dense)  # they would have the sizes of before
    todo = [group for group in structure.groups if 0 < len(groups[group.key].kept) < group.count]
    removed = {group.key: _removed(group, groups[group.key]) for group in todo}
    graph = _graph(dense, inputs) if any(not _is_explicit(dense, group) for group in todo) else None
    before = _layer_sizes(dense, todo)
    # Layers that the output does not depend on (the last block, if an earlier output is taken) are not in the graph.
    traced = [group for group in todo if graph is not None and _is_traced(dense, graph, group)]
    for group in traced:
        _remove_traced(dense, graph, group, removed[group.key])
    _remove_explicitly(dense, [group for group in todo if group not in traced], removed)
    _check_shapes(dense, before, _Cuts.of(todo, removed))
    for group in todo:
        _set_sizes(dense, group, group.count - len(removed[group.key]))
    dense.requires_grad_(False)
    _check_untouched(model, dense, structure)
    for group in structure.groups:
        if not groups[group.key].kept:
            drop(dense, group)
    return dense, shrunk(structure, groups)


def copied(model: Module) -> Module:
    """A deep copy. The many empty containers of modules, such as those for hooks, are made here, which is faster."""
    values = [value for module in model.modules() for value in vars(module).values()]
    empty = {id(one): type(one)() for one in values if type(one) in (dict, OrderedDict, set) and not one}
    return copy.deepcopy(model, empty)


def shrunk(structure: Structure, groups: Mapping[str, GroupPlan]) -> Structure:
    """The structure after the plan: same groups, with the number of units that stay."""
    removed = {group.key: _removed(group, groups[group.key]) for group in structure.groups}
    cuts = _Cuts.of(structure.groups, removed)
    return dataclasses.replace(
        structure, groups=tuple(_smaller(group, groups[group.key].kept, cuts) for group in structure.groups)
    )


def _removed(group: UnitGroup, plan: GroupPlan) -> list[int]:
    return sorted(set(range(group.count)) - set(plan.kept))


@dataclasses.dataclass(frozen=True)
class _Cuts:
    """What goes from each layer and tensor, of all groups together. rows: layer or norm -> output features. columns:
    layer -> input features. entries: (parameter or buffer, dimension) -> entries along it. All in ascending order."""

    rows: dict[str, list[int]]
    columns: dict[str, list[int]]
    entries: dict[tuple[str, int], list[int]]

    @classmethod
    def of(cls, groups: Iterable[UnitGroup], removed: Mapping[str, Sequence[int]]) -> _Cuts:
        rows: dict[str, set[int]] = defaultdict(set)
        columns: dict[str, set[int]] = defaultdict(set)
        entries: dict[tuple[str, int], set[int]] = defaultdict(set)
        for group in groups:
            units = removed[group.key]
            for producer in group.producers:
                every = group.rows_of(producer, units)
                for path in (producer.path, producer.norm):
                    rows[path or producer.path].update(every)
            for path in group.reads:
                columns[path].update(group.columns_of(path, units))
            for table in group.tables:
                entries[table.path, table.dim].update(group.entries_of(table, units))
        return cls(
            {path: sorted(found) for path, found in rows.items()},
            {path: sorted(found) for path, found in columns.items()},
            {at: sorted(found) for at, found in entries.items()},
        )


def _smaller(group: UnitGroup, kept: Sequence[int], cuts: _Cuts) -> UnitGroup:
    """The group with the units that stay; explicit rows, columns and entries get the numbers that they have after the
    cut, also of other groups' units."""
    producers = tuple(
        dataclasses.replace(one, index=_renumbered(one.index, kept, cuts.rows[one.path])) for one in group.producers
    )
    tables = tuple(
        dataclasses.replace(one, index=_renumbered(one.index, kept, cuts.entries[one.path, one.dim]))
        for one in group.tables
    )
    columns = tuple((path, _renumbered(index, kept, cuts.columns[path]) or ()) for path, index in group.columns)
    return dataclasses.replace(group, count=len(kept), producers=producers, tables=tables, columns=columns)


def _renumbered(
    index: tuple[tuple[int, ...], ...] | None, kept: Sequence[int], removed: Sequence[int]
) -> tuple[tuple[int, ...], ...] | None:
    if index is None:
        return None
    return tuple(tuple(row - bisect.bisect(removed, row) for row in index[unit]) for unit in kept)


def drop(model: TaskModel, group: UnitGroup) -> None:
    """Replace a sub-layer that keeps no unit by its output bias, and bypass modules that only it needed."""
    assert group.sublayer is not None  # see _check
    consumer = get_layer(model, group.consumer)
    bias = consumer.bias.detach().clone() if consumer.bias is not None else torch.zeros(len(consumer.weight))
    # It runs once in a pass (see `find_structure`), under any of its names.
    set_module(model, group.sublayer, Constant(bias, group.returns_tuple, group.expands), everywhere=True)
    for path, returns_tuple in group.bypass:
        set_module(model, path, Passthrough(returns_tuple))


def _check(structure: Structure, groups: Mapping[str, GroupPlan]) -> None:
    expected = {group.key: group.count for group in structure.groups}
    given = {key: plan.count for key, plan in groups.items()}
    if expected != given:
        wrong = sorted(set(expected.items()) ^ set(given.items()))[0]
        raise InputError("the plan is not for this model", f"they differ at {wrong}", "search again with this model")
    emptied = next((group.key for group in structure.groups if not groups[group.key].kept and not group.sublayer), None)
    if emptied is not None:
        raise InputError(f"the plan keeps nothing of {emptied}", "its layers need at least one", "keep one")


def _graph(dense: TaskModel, inputs: Inputs) -> Any:
    # The graph is traced through autograd, so weights must require gradients while it is built.
    dense.requires_grad_(True)
    with torch.enable_grad(), warnings.catch_warnings():
        # It warns of bare parameters (class token, layer scale); none is on a path that is cut, see _check_untouched.
        warnings.simplefilter("ignore")
        return torch_pruning.DependencyGraph().build_dependency(dense, example_inputs=dict(inputs))


def _is_explicit(model: TaskModel, group: UnitGroup) -> bool:
    """Whether the graph cannot see which rows belong together: fused projections after reshape and unbind, heads of
    several sizes, tables, grouped convolutions, gates that scale the units."""
    layers = [get_module(model, producer.path) for producer in group.producers]
    return (
        group.found
        or bool(group.tables)
        or (bool(group.readers) and not group.coupled)
        or any(producer.fused > 1 or producer.rows is not None for producer in group.producers)
        or any(isinstance(layer, nn.Conv2d) and layer.groups > 1 for layer in layers)
    )


def _is_traced(model: TaskModel, graph: Any, group: UnitGroup) -> bool:
    known = get_module(model, group.producers[0].path) in graph.module2node
    return not _is_explicit(model, group) and (group.coupled or known)


def _remove_traced(model: TaskModel, graph: Any, group: UnitGroup, removed: list[int]) -> None:
    first = get_module(model, group.producers[0].path)
    is_convolution = isinstance(first, nn.Conv2d)
    cut = torch_pruning.prune_conv_out_channels if is_convolution else torch_pruning.prune_linear_out_channels
    rows = [unit * group.rows + offset for unit in removed for offset in range(group.rows)]
    graph.get_pruning_group(first, cut, rows).prune()


def _set_sizes(model: TaskModel, group: UnitGroup, left: int) -> None:
    for attribute, per_unit in group.sizes:
        if is_code_size(attribute):
            replace_size(model, attribute, per_unit, left)
        else:
            set_size(model, attribute, per_unit * left)


def set_size(model: nn.Module, attribute: str, value: int) -> None:
    """Set an attribute that holds a size, by its path; an object that is no module, such as a configuration that the
    module shares with others, is copied for the module first. A number at the end is an index in a tuple or list."""
    path, _, name = attribute.rpartition(".")
    owner, rest = model, path.split(".") if path else []
    while rest and isinstance(getattr(owner, rest[0]), nn.Module):
        owner = getattr(owner, rest.pop(0))
    target: Any = owner
    for part in rest:
        held = getattr(target, part)
        if isinstance(held, tuple | list):
            setattr(target, part, type(held)([*held[: int(name)], value, *held[int(name) + 1 :]]))
            return
        setattr(target, part, own := copy.copy(held))
        target = own
    setattr(target, name, value)


def _remove_explicitly(model: TaskModel, groups: Sequence[UnitGroup], removed: Mapping[str, Sequence[int]]) -> None:
    """Cut all groups at once: several may have rows or columns in one layer."""
    cuts = _Cuts.of(groups, removed)
    loose = {one.path for group in groups for one in group.producers if one.keeps_inputs}
    for path, rows in cuts.rows.items():
        layer = get_module(model, path)
        if path in loose:
            cut_rows_of_groups(layer, rows)
        else:
            _cut_rows(layer, rows)
    for path, columns in cuts.columns.items():
        reader = get_module(model, path)
        is_linear = isinstance(reader, nn.Linear)
        cut = torch_pruning.prune_linear_in_channels if is_linear else torch_pruning.prune_conv_in_channels
        cut(reader, columns)
    for group in groups:
        select_heads(model, group, removed[group.key])
    for (path, dim), entries in cuts.entries.items():
        where, _, name = path.rpartition(".")
        module = get_module(model, where)
        tensor = getattr(module, name)
        gone = set(entries)
        kept = torch.tensor([entry for entry in range(tensor.shape[dim]) if entry not in gone])
        smaller = tensor.detach().index_select(dim, kept)
        is_parameter = isinstance(tensor, nn.Parameter)
        setattr(module, name, nn.Parameter(smaller, requires_grad=False) if is_parameter else smaller)
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d | nn.BatchNorm3d):
            module.num_features = len(kept)


def _cut_rows(layer: Any, rows: list[int]) -> None:
    if isinstance(layer, nn.Linear):
        torch_pruning.prune_linear_out_channels(layer, rows)
    elif isinstance(layer, nn.BatchNorm1d | nn.BatchNorm2d | nn.BatchNorm3d):
        torch_pruning.prune_batchnorm_out_channels(layer, rows)
    elif layer.groups == 1:
        torch_pruning.prune_conv_out_channels(layer, rows)
    else:
        _cut_filters(layer, rows)


def _cut_filters(layer: Any, rows: list[int]) -> None:
    """Cut whole groups of a grouped convolution, with the inputs that only they read."""
    gone, groups = set(rows), len(rows) * layer.groups // layer.out_channels
    kept = [row for row in range(layer.out_channels) if row not in gone]
    layer.weight = nn.Parameter(layer.weight.detach()[kept], requires_grad=False)
    if layer.bias is not None:
        layer.bias = nn.Parameter(layer.bias.detach()[kept], requires_grad=False)
    layer.out_channels = len(kept)
    layer.in_channels -= groups * layer.weight.shape[1]
    layer.groups -= groups


def _check_untouched(model: TaskModel, dense: TaskModel, structure: Structure) -> None:
    """Nothing but the declared producers and consumers may have changed its shape; anything else is a bug of ours."""
    paths = {path for group in structure.groups for path in group.reads}
    paths |= {producer.path for group in structure.groups for producer in group.producers}
    paths |= {producer.norm for group in structure.groups for producer in group.producers if producer.norm}
    # By identity: a module may have several names.
    layers = {id(model.get_submodule(path)) for path in paths}
    named = model.named_modules(remove_duplicate=False)
    declared = {name for name, module in named if id(module) in layers}
    before = {name: tensor.shape for name, tensor in model.state_dict().items()}
    after = {name: tensor.shape for name, tensor in dense.state_dict().items()}
    selections = {f"{group.selects[0]}.{SELECTED_HEADS}" for group in structure.groups if group.selects is not None}
    selections |= {f"{name}.{ROWS_OF_GROUPS}" for name in declared}
    after = {name: shape for name, shape in after.items() if name in before or name not in selections}
    changed = {name for name in before if after.get(name) != before[name]}
    tables = {table.path for group in structure.groups for table in group.tables}
    stray = {name for name in changed if name.rpartition(".")[0] not in declared and name not in tables | selections}
    if stray or before.keys() != after.keys():
        raise RuntimeError(f"the dependency graph also changed {sorted(stray)}")


def _layer_sizes(model: TaskModel, groups: Sequence[UnitGroup]) -> dict[str, tuple[int, int]]:
    """(outputs, inputs) of the weights of all layers that make or read units."""
    paths = {path for group in groups for path in (*(one.path for one in group.producers), *group.reads)}
    weights = {path: get_weight(get_layer(model, path)) for path in sorted(paths)}
    return {path: (weight.shape[0], weight.shape[1]) for path, weight in weights.items()}


def _check_shapes(model: TaskModel, before: Mapping[str, tuple[int, int]], cuts: _Cuts) -> None:
    """The layers must have lost exactly what the groups declare; anything else is a bug of ours.

    before: their sizes before the cut.
    """
    wrong = {}
    for path, (outputs, inputs) in before.items():
        weight = get_weight(get_layer(model, path))
        expected = outputs - len(cuts.rows.get(path, ())), inputs - len(cuts.columns.get(path, ()))
        if tuple(weight.shape[:2]) != expected:
            wrong[path] = tuple(weight.shape[:2]), expected
    if wrong:
        raise RuntimeError(f"(sizes, expected sizes) of the layers: {wrong}")
