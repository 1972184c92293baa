"""Groups whose units can only go together, because the code splits one layer's output into equal parts, or gives the
size of what it joins for one layer to read.

Such as `split(out, self.width, 1)`, or `cat(parts, 2).view(rows, tokens, 2 * width)`: unit i of the joined group is
unit i of every part.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterator, Sequence

from optin_export.units import Table, UnitGroup

Index = tuple[tuple[int, ...], ...]


def tied_groups(groups: Sequence[UnitGroup], failed: Collection[str]) -> Iterator[tuple[list[UnitGroup], UnitGroup]]:
    """(groups that share a layer which makes them, or of which none can go alone and one layer reads all, and have as
    many units; the joined group).

    failed: keys of groups that cannot be removed alone; each result has one of them.
    """
    sets: list[list[UnitGroup]] = []
    for group in groups:
        near = [one for one in sets if any(_share(group, other, failed) for other in one)]
        sets = [one for one in sets if one not in near] + [[*(other for one in near for other in one), group]]
    for one in sets:
        if len(one) > 1 and any(group.key in failed for group in one):
            yield one, _joined(sorted(one, key=groups.index))


def _share(one: UnitGroup, other: UnitGroup, failed: Collection[str]) -> bool:
    if (one.kind, one.count) != (other.kind, other.count):
        return False
    if {producer.path for producer in one.producers} & {producer.path for producer in other.producers}:
        return True
    return {one.key, other.key} <= set(failed) and one.consumer == other.consumer


def _joined(groups: Sequence[UnitGroup]) -> UnitGroup:
    """One group of the units of all, with the consumer of the last."""
    last, units = groups[-1], range(groups[0].count)
    rows: dict[str, Index] = {}
    columns: dict[str, Index] = {}
    entries: dict[tuple[str, int], Index] = {}
    for group in groups:
        for producer in group.producers:
            own = tuple(tuple(group.rows_of(producer, [unit])) for unit in units)
            rows[producer.path] = _both(rows.get(producer.path), own)
        for path in group.reads:
            columns[path] = _both(columns.get(path), tuple(tuple(group.columns_of(path, [unit])) for unit in units))
        for table in group.tables:
            at = table.path, table.dim
            entries[at] = _both(entries.get(at), tuple(tuple(group.entries_of(table, [unit])) for unit in units))
    makers = {producer.path: producer for group in groups for producer in group.producers}
    return dataclasses.replace(
        last,
        width=len(columns[last.consumer][0]),
        producers=tuple(
            dataclasses.replace(makers[path], fused=1, rows=None, index=index) for path, index in rows.items()
        ),
        readers=tuple(path for path in columns if path != last.consumer),
        columns=tuple(columns.items()),
        tables=tuple(Table(path, dim, index=index) for (path, dim), index in entries.items()),
    )


def _both(one: Index | None, other: Index) -> Index:
    return other if one is None else tuple((*a, *b) for a, b in zip(one, other, strict=True))
