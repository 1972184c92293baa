"""Verify units that were found by measurement: the rebuilt model must equal the masked one.

Per type of group (kind, class of block, sizes), half of the units of one group are removed and the outputs compared.
Attributes that hold sizes (numbers of heads, widths) are found by their value, changed, and tried. Finally all groups
are cut together. Types that fail are left whole, with the reason.
"""

from __future__ import annotations

import dataclasses
import itertools
import posixpath
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import nn

from optin_export.errors import InputError
from optin_export.models import Inputs, TaskModel
from optin_export.pruning.code_sizes import is_code_size
from optin_export.pruning.counted_costs import random_half, with_costs
from optin_export.pruning.measured_sizes import measured_sizes
from optin_export.pruning.mixing import module_that_mixes
from optin_export.pruning.rebuild import rebuild
from optin_export.pruning.size_attributes import Sizes, modules_around, possible_sizes
from optin_export.pruning.tied_groups import tied_groups
from optin_export.search import GroupPlan
from optin_export.units import (
    TOKENS,
    Refusal,
    Structure,
    UnitGroup,
    arguments_by_head,
    few_rows,
    masked,
    nothing_left,
    without_zeros,
)

#: Largest difference between the masked and the rebuilt model, relative to the largest output.
TOLERANCE = 1e-4
#: (number of the variant, units that stay in each group) -> the masked model's output. Sizes change nothing in it.
Outputs = dict[tuple[int, tuple[tuple[int, ...], ...]], torch.Tensor]
#: Sets of attributes that are tried before the sizes in the code are measured.
FEW_ATTRIBUTES = 10


def verified(model: TaskModel, structure: Structure, inputs: Inputs) -> Structure:
    """The structure with those found groups whose removal is exact, their size attributes and measured costs.

    inputs: two rows or more. Declared groups are returned as they are. Raises InputError if no group is left.
    """
    found = [group for group in structure.groups if group.found]
    if not found:
        return structure
    with without_zeros(model):
        return with_costs(model, _exact(model, structure, found, inputs), inputs)


def _exact(model: TaskModel, structure: Structure, found: Sequence[UnitGroup], inputs: Inputs) -> Structure:
    variants = _variants(model, inputs)
    kept: dict[str, UnitGroup] = {group.key: group for group in structure.groups if not group.found}
    refused = list(structure.refused)
    failed: dict[str, Refusal] = {}
    for groups, tried in _checked(model, structure, list(_types(model, structure, found)), variants):
        if isinstance(tried, str):
            mixing = module_that_mixes(model, groups[0], variants[0])
            why = tried if mixing is None else f"'{mixing}' mixes the features of all of them"
            failed |= dict.fromkeys((group.key for group in groups), _refusal(groups, why))
        else:
            kept |= {group.key: group for group in tried}
    # Also with parts that can go alone: the last part of a split may be smaller.
    ties = {joined.key: (joined, parts) for parts, joined in tied_groups(found, failed)}
    joined = list(_types(model, structure, [one for one, _ in ties.values()]))
    for groups, tried in _checked(model, structure, joined, variants):
        if not isinstance(tried, str):
            for part in (part for group in groups for part in ties[group.key][1]):
                failed.pop(part.key, None)
                kept.pop(part.key, None)
            kept |= {group.key: group for group in tried}
    refused += dict.fromkeys(failed.values())
    return _together(model, _of_those(structure, kept, refused), variants)


def _together(model: TaskModel, structure: Structure, variants: Sequence[Inputs]) -> Structure:
    """The structure without groups that cannot be removed together with those before them, although each can alone."""
    kept = {group.key: group for group in structure.groups if not group.found}
    refused = list(structure.refused)

    def add(types: Sequence[list[UnitGroup]]) -> None:
        every = [group for groups in types for group in groups]
        others = [group for group in kept.values() if group.found]
        wrong = _wrong(model, structure, [*others, *every], variants)
        if wrong is None:
            kept.update({group.key: group for group in every})
        elif len(types) == 1 and len(every) > 1:
            add([[group] for group in every])
        elif len(types) == 1:
            refused.append(_refusal(types[0], f"together with other units: {wrong}"))
        else:
            add(types[: len(types) // 2])
            add(types[len(types) // 2 :])

    add(list(_types(model, structure, [group for group in structure.groups if group.found])))
    return _of_those(structure, kept, refused)


def _of_those(structure: Structure, kept: Mapping[str, UnitGroup], refused: Sequence[Refusal]) -> Structure:
    groups = tuple(kept[group.key] for group in structure.groups if group.key in kept)
    if not groups:
        raise nothing_left(refused)
    return dataclasses.replace(structure, groups=groups, refused=tuple(refused))


def inexact(model: TaskModel, structure: Structure, groups: Sequence[UnitGroup], inputs: Inputs) -> str | None:
    """Why the rebuilt model without half of these units, or without sub-layers that may go as a whole, is not the
    masked one; None if it is."""
    with without_zeros(model):
        variants = _variants(model, inputs)
        try:
            why = _wrong(model, structure, groups, variants)
            whole = [group for group in groups if group.sublayer is not None]
            if why is not None or not whole:
                return why
            empty = {group.key: GroupPlan(count=group.count, kept=()) for group in whole}
            why = _difference(model, structure, whole, empty, variants)
        except RuntimeError as error:  # they are declared with another number of units or features
            return f"the units that '{groups[0].consumer}' reads cannot be masked: {error}"[:300]
    return None if why is None else f"'{whole[0].sublayer}' cannot go as a whole: {why}"


def _types(model: nn.Module, structure: Structure, groups: Sequence[UnitGroup]) -> Iterator[list[UnitGroup]]:
    """Groups that are alike: one of them stands for all."""

    def key(group: UnitGroup) -> tuple[object, ...]:
        block = structure.blocks[group.block]
        relative = group.consumer.removeprefix(f"{block}.")
        own = relative if relative != group.consumer else group.consumer
        kinds = tuple(type(model.get_submodule(path)).__name__ for path in (block, *modules_around(block, group)))
        return kinds, own, group.kind, group.part, group.count, group.width

    found: dict[tuple[object, ...], list[UnitGroup]] = {}
    for group in groups:
        found.setdefault(key(group), []).append(group)
    yield from found.values()


def _checked(
    model: TaskModel, structure: Structure, types: Sequence[list[UnitGroup]], variants: Sequence[Inputs]
) -> Iterator[tuple[list[UnitGroup], list[UnitGroup] | str]]:
    """(groups that are alike, as they can be removed or why not). Types are checked together, in halves if that fails;
    heads, which need sizes, one type after the other."""
    together = [groups for groups in types if groups[0].kind != "heads"]
    alone = [groups for groups in types if groups[0].kind == "heads"]
    every = [group for groups in together for group in groups]
    if len(together) > 1 and _wrong(model, structure, every, variants) is None:
        yield from ((groups, groups) for groups in together)
    elif len(together) > 1:
        half = len(together) // 2
        yield from _checked(model, structure, together[:half], variants)
        yield from _checked(model, structure, together[half:], variants)
    else:
        alone += together
    for groups in alone:
        yield groups, _tried(model, structure, groups, variants)


def _tried(
    model: TaskModel, structure: Structure, groups: Sequence[UnitGroup], variants: Sequence[Inputs]
) -> list[UnitGroup] | str:
    """The groups with sizes for which the first one can be removed exactly; the reason if there are none."""
    first, wrong, known = groups[0], "", Outputs()
    block = structure.blocks[first.block]
    selections = _possible_selections(model, first, variants)
    attributes = list(possible_sizes(model, block, first))
    for code, selects, sizes in _trials(model, first, variants, selections, attributes):
        group = dataclasses.replace(first, sizes=(*sizes, *code), selects=selects)
        result = _wrong(model, structure, [group], variants, known)
        if result is None:
            group = _with_least_sizes(model, structure, group, variants, known)
            same = [_like(one, structure.blocks[one.block], group, block) for one in groups[1:]]
            return [group, *(_with_own_code_sizes(model, one, variants) for one in same)]
        wrong = wrong or result
    return wrong


def _trials(
    model: TaskModel,
    group: UnitGroup,
    variants: Sequence[Inputs],
    selections: Sequence[tuple[str, tuple[str, ...]] | None],
    attributes: Sequence[Sizes],
) -> Iterator[tuple[Sizes, tuple[str, tuple[str, ...]] | None, Sizes]]:
    """(sizes in the code, arguments, attributes) to try: a few attributes, measured sizes in the code, all attributes,
    both."""
    yield from itertools.product(((),), selections, attributes[:FEW_ATTRIBUTES])
    code = _code_sizes(model, group, variants)
    yield from itertools.product(code, selections, ((),))
    yield from itertools.product(((),), selections, attributes[FEW_ATTRIBUTES:])
    yield from itertools.product(code, selections, attributes[1:])


def _code_sizes(model: TaskModel, group: UnitGroup, variants: Sequence[Inputs]) -> list[Sizes]:
    kept = random_half(group).kept
    return measured_sizes(model, group, [unit for unit in range(group.count) if unit not in kept], variants)


def _with_own_code_sizes(model: TaskModel, group: UnitGroup, variants: Sequence[Inputs]) -> UnitGroup:
    """The group with the sizes in the code around its own layers, instead of those of another block, if they are found.

    Blocks of one class may run other code: only some shift windows, or reduce keys.
    """
    attributes = tuple(one for one in group.sizes if not is_code_size(one[0]))
    code = group.sizes[len(attributes) :]
    if not code:
        return group

    def similar(sizes: Sizes) -> tuple[str, bool]:
        return sizes[0][0].rpartition(".")[0], any("whole" in name for name, _ in sizes)

    own = next((sizes for sizes in _code_sizes(model, group, variants) if similar(sizes) == similar(code)), code)
    return dataclasses.replace(group, sizes=(*attributes, *own))


def _with_least_sizes(
    model: TaskModel, structure: Structure, group: UnitGroup, variants: Sequence[Inputs], known: Outputs
) -> UnitGroup:
    """The group without attributes that need not change: they have such a value by chance."""
    for one in group.sizes:
        if is_code_size(one[0]):
            continue
        fewer = dataclasses.replace(group, sizes=tuple(other for other in group.sizes if other != one))
        if _wrong(model, structure, [fewer], variants, known) is None:
            group = fewer
    return group


def _possible_selections(
    model: nn.Module, group: UnitGroup, variants: Sequence[Inputs]
) -> list[tuple[str, tuple[str, ...]] | None]:
    """(module around the group's layers, its arguments with all heads), if there are any; then None."""
    if group.kind != "heads":
        return [None]
    paths = [*(one.path for one in group.producers), *group.reads]
    path = posixpath.commonpath([one.replace(".", "/") for one in paths]).replace("/", ".")
    arguments = arguments_by_head(model, path, group.count, variants)
    return [(path, arguments), None] if arguments else [None]


def _like(group: UnitGroup, block: str, found: UnitGroup, other: str) -> UnitGroup:
    """The group of another block with the sizes found for the same group of block `other`."""
    sizes, selects = found.sizes, found.selects
    if block != other:
        sizes = tuple((f"{block}{path.removeprefix(other)}", per_unit) for path, per_unit in sizes)
        selects = selects and (f"{block}{selects[0].removeprefix(other)}", selects[1])
    return dataclasses.replace(group, sizes=sizes, selects=selects)


def _wrong(
    model: TaskModel,
    structure: Structure,
    groups: Sequence[UnitGroup],
    variants: Sequence[Inputs],
    known: Outputs | None = None,
) -> str | None:
    """Why the model without half of these units is not the masked one; None if it is.

    known: outputs of the masked model for these groups, of earlier calls; further ones are added.
    """
    halves = {group.key: random_half(group) for group in groups}
    fewest = {group.key: GroupPlan(count=group.count, kept=(group.count - 1,)) for group in groups}
    for plans in (halves, fewest):
        why = _difference(model, structure, groups, plans, variants, known)
        if why is not None:
            return why
    return None


def _difference(
    model: TaskModel,
    structure: Structure,
    groups: Sequence[UnitGroup],
    plans: Mapping[str, GroupPlan],
    variants: Sequence[Inputs],
    known: Outputs | None = None,
) -> str | None:
    part = dataclasses.replace(structure, groups=tuple(groups))
    masks = {group.key: torch.zeros(group.count) for group in groups}
    for group in groups:
        masks[group.key][list(plans[group.key].kept)] = 1
    reading = f"'{groups[0].consumer}' reads" if len(groups) == 1 else "these layers read"
    try:
        dense, _ = rebuild(model, part, plans, variants[0])
    except (RuntimeError, IndexError, AssertionError, AttributeError, InputError) as error:
        return f"the units that {reading} cannot be cut: {error}"[:300]
    known, stay = Outputs() if known is None else known, tuple(plans[group.key].kept for group in groups)
    for number, inputs in enumerate(variants):
        try:  # before the masked pass, which would be in vain for sizes that do not fit
            with torch.no_grad():
                got = dense(**inputs)
        except Exception as error:  # a module's own code, on sizes that it does not expect
            return f"without some of the units that {reading} the model does not run: {type(error).__name__}: {error}"[
                :300
            ]
        if (number, stay) not in known:
            with torch.no_grad(), masked(model, groups, masks):
                known[number, stay] = model(**inputs)
        wanted = known[number, stay]
        if got.shape != wanted.shape:
            return f"without some of the units that {reading} the output has another shape"
        difference = float((got - wanted).abs().max() / wanted.abs().max().clamp(min=1e-12))
        if not difference <= TOLERANCE:
            return f"without some of the units that {reading} the model differs from the masked one: {difference:.1e}"
    return None


def _variants(model: TaskModel, inputs: Inputs) -> list[Inputs]:
    """Two batch sizes, and a shorter length if the model takes one."""
    two, half = few_rows(model, inputs, rows=2), few_rows(model, inputs, rows=2, tokens=TOKENS // 2)
    variants = [two, {name: tensor[:1] for name, tensor in two.items()}]
    if any(half[name].shape != tensor.shape for name, tensor in two.items()):
        variants.append(half)
    return variants


def _refusal(groups: Sequence[UnitGroup], why: str) -> Refusal:
    kinds, count = groups[0].kind, len(groups)
    where = f"'{groups[0].consumer}'" + (f" and {count - 1} layers like it" if count > 1 else "")
    return Refusal(kinds, InputError(f"the {kinds} that {where} reads cannot be removed", why, "leave them"))
