"""Attributes that may hold sizes of a group of units, such as numbers of heads and widths, found by their value."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from torch import nn

from optin_export.units import Layer, UnitGroup

#: Largest number of heads in a unit that is tried (grouped queries).
MOST_SHARED = 16
#: Attributes of layers that change with their weights.
_CUT = ("in_features", "out_features", "in_channels", "out_channels", "num_features", "groups")
#: Attribute and its size per unit.
Sizes = tuple[tuple[str, int], ...]


def possible_sizes(model: nn.Module, block: str, group: UnitGroup) -> Iterator[Sizes]:
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
        if heads == (1,):  # one of several equal sizes
            yield from ((one,) for one in of_own if len(of_own) > 1)


def _integers(model: nn.Module, block: str, group: UnitGroup) -> Iterator[tuple[str, int]]:
    """Integer attributes of the modules around the group's layers, and of the configurations that these hold."""
    for path in modules_around(block, group):
        module, prefix = model.get_submodule(path), f"{path}." if path else ""
        cut = _CUT if isinstance(module, Layer | nn.BatchNorm1d | nn.BatchNorm2d) else ()
        for name, value in vars(module).items():
            if name in cut:
                continue
            if isinstance(value, int) and not isinstance(value, bool):
                yield f"{prefix}{name}", value
            elif isinstance(value, tuple | list) and all(type(one) is int for one in value):
                yield from ((f"{prefix}{name}.{number}", one) for number, one in enumerate(value))
            elif name == "config" or type(value).__name__.endswith("Config"):
                for field, number in vars(value).items():
                    if isinstance(number, int) and not isinstance(number, bool):
                        yield f"{prefix}{name}.{field}", number


def modules_around(block: str, group: UnitGroup) -> list[str]:
    """The modules around the group's layers, the innermost first: those of the block, or if that is a layer alone, the
    common parent of all layers and those inside it."""
    tables = (one.path for one in group.tables)
    layers = [group.consumer, *(one.path for one in group.producers), *group.readers, *tables]
    above = [[".".join(parts[:end]) for end in range(len(parts))] for parts in (path.split(".") for path in layers)]
    if block == group.consumer:
        block = max(set(above[0]).intersection(*above), key=len)
    around = {path for paths in above for path in paths if path == block or not block or path.startswith(f"{block}.")}
    return sorted(around, key=lambda path: (-path.count(".") - bool(path), path))
