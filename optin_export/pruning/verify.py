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
from optin_export.pruning.measured_sizes import measured_sizes
from optin_export.pruning.rebuild import rebuild
from optin_export.search import GroupPlan
from optin_export.units import (
    TOKENS,
    Refusal,
    Structure,
    UnitGroup,
    arguments_by_head,
    count_macs,
    few_rows,
    masked,
    measure_costs,
    nothing_left,
)

#: Largest difference between the masked and the rebuilt model, relative to the largest output.
TOLERANCE = 1e-4
#: Largest number of heads in a unit that is tried (grouped queries).
MOST_SHARED = 16
#: Sets of attributes that are tried before the sizes in the code are measured.
FEW_ATTRIBUTES = 10
Sizes = tuple[tuple[str, int], ...]


def verified(model: TaskModel, structure: Structure, inputs: Inputs) -> Structure:
    """The structure with those found groups whose removal is exact, their size attributes and measured costs.

    inputs: two rows or more. Declared groups are returned as they are. Raises InputError if no group is left.
    """
    found = [group for group in structure.groups if group.found]
    if not found:
        return structure
    variants = _variants(model, inputs)
    kept: dict[str, UnitGroup] = {group.key: group for group in structure.groups if not group.found}
    refused = list(structure.refused)
    for groups in _types(model, structure, found):
        tried = _tried(model, structure, groups, variants, inputs)
        if isinstance(tried, str):
            refused.append(_refusal(groups, tried))
        else:
            kept |= {group.key: group for group in tried}
    structure = _of_those(structure, kept, refused)
    wrong = _wrong(model, structure, [group for group in structure.groups if group.found], variants)
    if wrong is not None:
        structure = _without_wrong(model, structure, variants)
        wrong = _wrong(model, structure, [group for group in structure.groups if group.found], variants)
    if wrong is not None:
        raise InputError(
            "the units of the model cannot be removed together",
            wrong,
            "name one kind in prune.units, or declare a family for this architecture (docs/families.md)",
        )
    return structure


def _of_those(structure: Structure, kept: Mapping[str, UnitGroup], refused: Sequence[Refusal]) -> Structure:
    groups = tuple(kept[group.key] for group in structure.groups if group.key in kept)
    if not groups:
        raise nothing_left(refused)
    return dataclasses.replace(structure, groups=groups, refused=tuple(refused))


def _without_wrong(model: TaskModel, structure: Structure, variants: Sequence[Inputs]) -> Structure:
    """The structure without groups that cannot be removed, although a similar one can."""
    kept, refused = dict[str, UnitGroup](), list(structure.refused)
    for group in structure.groups:
        wrong = _wrong(model, structure, [group], variants) if group.found else None
        if wrong is None:
            kept[group.key] = group
        else:
            refused.append(_refusal([group], wrong))
    return _of_those(structure, kept, refused)


def inexact(model: TaskModel, structure: Structure, groups: Sequence[UnitGroup], inputs: Inputs) -> str | None:
    """Why the rebuilt model without half of these units is not the masked one; None if it is."""
    return _wrong(model, structure, groups, _variants(model, inputs))


def _types(model: nn.Module, structure: Structure, groups: Sequence[UnitGroup]) -> Iterator[list[UnitGroup]]:
    """Groups that are alike: one of them stands for all."""

    def key(group: UnitGroup) -> tuple[object, ...]:
        block = structure.blocks[group.block]
        relative = group.consumer.removeprefix(f"{block}.")
        own = relative if relative != group.consumer else group.consumer
        kinds = tuple(type(model.get_submodule(path)).__name__ for path in (block, *_around(block, group)))
        return kinds, own, group.kind, group.part, group.count, group.width

    found: dict[tuple[object, ...], list[UnitGroup]] = {}
    for group in groups:
        found.setdefault(key(group), []).append(group)
    yield from found.values()


def _tried(
    model: TaskModel, structure: Structure, groups: Sequence[UnitGroup], variants: Sequence[Inputs], inputs: Inputs
) -> list[UnitGroup] | str:
    """The groups with sizes for which the first one can be removed exactly; the reason if there are none.

    inputs: at the shape at which costs are counted.
    """
    first, wrong = groups[0], ""
    block = structure.blocks[first.block]
    selections = _possible_selections(model, first, variants)
    attributes = list(_possible_sizes(model, block, first))
    for code, selects, sizes in _trials(model, first, variants, selections, attributes):
        group = dataclasses.replace(first, sizes=(*sizes, *code), selects=selects)
        result = _wrong(model, structure, [group], variants)
        if result is None:
            group = _with_least_sizes(model, structure, group, variants)
            outside = _outside(model, structure, group, inputs)
            found = dataclasses.replace(group, outside=outside)
            same = [_like(one, structure.blocks[one.block], found, block) for one in groups[1:]]
            return [found, *(_with_own_code_sizes(model, one, variants) for one in same)]
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
    """The group with the sizes in the code around its own layers, instead of those of another block.

    Blocks of one class may run other code: only some shift windows, or reduce keys.
    """
    attributes = tuple(one for one in group.sizes if not is_code_size(one[0]))
    code = group.sizes[len(attributes) :]
    if not code:
        return group

    def similar(sizes: Sizes) -> tuple[str, bool]:
        return sizes[0][0].rpartition(".")[0], any("whole" in name for name, _ in sizes)

    own = next((sizes for sizes in _code_sizes(model, group, variants) if similar(sizes) == similar(code)), ())
    return dataclasses.replace(group, sizes=(*attributes, *own))


def _with_least_sizes(
    model: TaskModel, structure: Structure, group: UnitGroup, variants: Sequence[Inputs]
) -> UnitGroup:
    """The group without attributes that need not change: they have such a value by chance."""
    for one in group.sizes:
        if is_code_size(one[0]):
            continue
        fewer = dataclasses.replace(group, sizes=tuple(other for other in group.sizes if other != one))
        if _wrong(model, structure, [fewer], variants) is None:
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
    return dataclasses.replace(group, sizes=sizes, selects=selects, outside=found.outside)


def _wrong(
    model: TaskModel, structure: Structure, groups: Sequence[UnitGroup], variants: Sequence[Inputs]
) -> str | None:
    """Why the model without half of these units is not the masked one; None if it is."""
    halves = {group.key: random_half(group) for group in groups}
    fewest = {group.key: GroupPlan(count=group.count, kept=(group.count - 1,)) for group in groups}
    for plans in (halves, fewest):
        why = _difference(model, structure, groups, plans, variants)
        if why is not None:
            return why
    return None


def _difference(
    model: TaskModel,
    structure: Structure,
    groups: Sequence[UnitGroup],
    plans: Mapping[str, GroupPlan],
    variants: Sequence[Inputs],
) -> str | None:
    part = dataclasses.replace(structure, groups=tuple(groups))
    masks = {group.key: torch.zeros(group.count) for group in groups}
    for group in groups:
        masks[group.key][list(plans[group.key].kept)] = 1
    where = f"'{groups[0].consumer}'" if len(groups) == 1 else "these layers"
    try:
        dense, _ = rebuild(model, part, plans, variants[0])
    except (RuntimeError, IndexError, AssertionError, InputError) as error:
        return f"the layers around {where} cannot be cut: {error}"[:300]
    for inputs in variants:
        try:
            with torch.no_grad():
                got = dense(**inputs)
        except Exception as error:  # a module's own code, on sizes that it does not expect
            return (
                f"without some of the units that {where} reads the model does not run: {type(error).__name__}: {error}"[
                    :300
                ]
            )
        with torch.no_grad(), masked(model, groups, masks):
            wanted = model(**inputs)
        if got.shape != wanted.shape:
            return f"without some of the units that {where} reads the output has another shape"
        difference = float((got - wanted).abs().max() / wanted.abs().max().clamp(min=1e-12))
        if not difference <= TOLERANCE:
            return (
                f"without some of the units that {where} reads the model differs from the masked one: {difference:.1e}"
            )
    return None


def random_half(group: UnitGroup) -> GroupPlan:
    """A random half of the units."""
    generator = torch.Generator().manual_seed(group.count)
    order = torch.randperm(group.count, generator=generator)[: max(1, group.count // 2)]
    return GroupPlan(count=group.count, kept=tuple(sorted(order.tolist())))


def _variants(model: TaskModel, inputs: Inputs) -> list[Inputs]:
    """Two batch sizes, and a shorter length if the model takes one."""
    two, half = few_rows(model, inputs, rows=2), few_rows(model, inputs, rows=2, tokens=TOKENS // 2)
    variants = [two, {name: tensor[:1] for name, tensor in two.items()}]
    if any(half[name].shape != tensor.shape for name, tensor in two.items()):
        variants.append(half)
    return variants


def _possible_sizes(model: nn.Module, block: str, group: UnitGroup) -> Iterator[Sizes]:
    """Sets of attributes that may hold sizes of the group, the smallest set first."""
    rows = [group.rows_in(one) * one.fused for one in group.producers]
    widths = {group.width, *rows, *(group.rows_in(one) for one in group.producers), sum(rows)} - {1}
    modules = {name for name, _ in model.named_modules()}
    own: dict[int, list[tuple[str, int]]] = {}
    shared: dict[int, list[tuple[str, int]]] = {}
    for path, value in _integers(model, block, group):
        if value % group.count == 0 and value:
            per_unit = value // group.count
            owner = path.rpartition(".")[0]
            in_tuple = path[-1].isdigit() and owner.rpartition(".")[0] in modules
            kind = own if owner in modules or in_tuple else shared
            kind.setdefault(per_unit, []).append((path, per_unit))
    many = [size for size in range(2, MOST_SHARED + 1) if group.width % size == 0 and (size in own or size in shared)]
    wide = [one for size in sorted(widths) for one in own.get(size, [])]
    fields_wide = [one for size in sorted(widths) for one in shared.get(size, [])]
    tried: set[Sizes] = set()
    for sizes in _combined(own, shared, many, wide, fields_wide):
        if sizes not in tried:
            tried.add(sizes)
            yield sizes


def _combined(
    own: Mapping[int, list[tuple[str, int]]],
    shared: Mapping[int, list[tuple[str, int]]],
    many: Sequence[int],
    wide: Sequence[tuple[str, int]],
    fields_wide: Sequence[tuple[str, int]],
) -> Iterator[Sizes]:
    for heads in ((), (1,), *((1, size) for size in many)):
        of_own = [one for size in heads for one in own.get(size, [])]
        of_shared = [one for size in heads for one in shared.get(size, [])]
        # Others, such as a window's size, may be as large as the number of heads by chance.
        named = [one for one in of_own if "head" in one[0].rpartition(".")[2]]
        for numbers in (of_own, named):
            for further in ([], wide, of_shared, [*wide, *of_shared], [*wide, *of_shared, *fields_wide]):
                yield tuple(sorted({*numbers, *further}))


def _integers(model: nn.Module, block: str, group: UnitGroup) -> Iterator[tuple[str, int]]:
    """Integer attributes of the modules around the group's layers, and of the configurations that these hold."""
    for path in _around(block, group):
        module, prefix = model.get_submodule(path), f"{path}." if path else ""
        for name, value in vars(module).items():
            if isinstance(value, int) and not isinstance(value, bool):
                yield f"{prefix}{name}", value
            elif isinstance(value, tuple) and all(type(one) is int for one in value):
                yield from ((f"{prefix}{name}.{number}", one) for number, one in enumerate(value))
            elif name == "config" or type(value).__name__.endswith("Config"):
                for field, number in vars(value).items():
                    if isinstance(number, int) and not isinstance(number, bool):
                        yield f"{prefix}{name}.{field}", number


def _around(block: str, group: UnitGroup) -> list[str]:
    """The modules around the group's layers, the innermost first: those of the block, or if that is a layer alone, the
    common parent of all layers and those inside it."""
    tables = (one.path for one in group.tables)
    layers = [group.consumer, *(one.path for one in group.producers), *group.readers, *tables]
    above = [[".".join(parts[:end]) for end in range(len(parts))] for parts in (path.split(".") for path in layers)]
    if block == group.consumer:
        block = max(set(above[0]).intersection(*above), key=len)
    around = {path for paths in above for path in paths if path == block or not block or path.startswith(f"{block}.")}
    return sorted(around, key=lambda path: (-path.count(".") - bool(path), path))


def _outside(model: TaskModel, structure: Structure, group: UnitGroup, inputs: Inputs) -> int | None:
    """MACs per unit outside the group's layers, if they are not those of attention."""
    one = {name: tensor[:1] for name, tensor in inputs.items()}
    plan = random_half(group)
    part = dataclasses.replace(structure, groups=(group,))
    dense, _ = rebuild(model, part, {group.key: plan}, one)
    measured = count_macs(dense, one)
    costs = measure_costs(model, part, one)
    kept = {group.key: len(plan.kept)}
    if costs.of("macs", kept) == measured:
        return None
    bare = dataclasses.replace(part, groups=(dataclasses.replace(group, outside=0),))
    removed = group.count - len(plan.kept)
    return round((measure_costs(model, bare, one).of("macs", kept) - measured) / removed)


def _refusal(groups: Sequence[UnitGroup], why: str) -> Refusal:
    kinds, count = groups[0].kind, len(groups)
    where = f"'{groups[0].consumer}'" + (f" and {count - 1} layers like it" if count > 1 else "")
    return Refusal(kinds, InputError(f"the {kinds} that {where} reads cannot be removed", why, "leave them"))
