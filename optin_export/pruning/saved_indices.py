"""Rows or columns per unit, as the file of a saved model holds them: short where they follow a rule.

An index is a list with a tuple of rows per unit. Its rows are written as runs [first, number of consecutive rows].
Units whose runs are those of the unit before, all moved by the same step, are written once: 64 channels in a row are
one `Repeated` of 64 units, step 1.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

from optin_export.errors import InputError

Number = Annotated[int, Field(ge=0, le=1 << 31)]
#: The rows of one unit, as runs (first, number of consecutive rows).
Unit = tuple[tuple[Number, Number], ...]
#: Units that are written one by one where fewer than this many follow a rule.
FEW = 3


class Repeated(BaseModel):
    """`units` units: the first has `runs`, and each further one those of the unit before, moved by `step`."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    units: Annotated[int, Field(ge=1, le=1 << 31)]
    step: Number
    runs: Unit


#: The rows of all units. Files of earlier versions hold units one by one only.
Index = tuple[Unit | Repeated, ...]


def short(index: Iterable[Iterable[int]] | None) -> Index | None:
    """The index as it is written."""
    if index is None:
        return None
    units, found = [_runs(unit) for unit in index], list[Unit | Repeated]()
    at = 0
    while at < len(units):
        step, alike = _alike(units, at)
        if alike < FEW:
            found.append(units[at])
            at += 1
        else:
            found.append(Repeated(units=alike, step=step, runs=units[at]))
            at += alike
    return tuple(found)


def _runs(unit: Iterable[int]) -> Unit:
    runs: list[tuple[int, int]] = []
    for entry in unit:
        if runs and entry == sum(runs[-1]):
            runs[-1] = runs[-1][0], runs[-1][1] + 1
        else:
            runs.append((entry, 1))
    return tuple(runs)


def _alike(units: Sequence[Unit], at: int) -> tuple[int, int]:
    """(step, number of units from this one on that follow the rule)"""
    if at + 1 == len(units) or not units[at] or not units[at + 1]:
        return 0, 1
    step = units[at + 1][0][0] - units[at][0][0]
    end = at + 1
    while step >= 0 and end < len(units) and units[end] == _moved(units[end - 1], step):
        end += 1
    return step, end - at


def _moved(unit: Unit, by: int) -> Unit:
    return tuple((first + by, size) for first, size in unit)


def extent(index: Index) -> tuple[int, int]:
    """(number of rows that the index names, the last of them + 1), without writing it out: a few bytes may name
    billions of rows."""
    named, end = 0, 0
    for one in index:
        units, step, runs = (one.units, one.step, one.runs) if isinstance(one, Repeated) else (1, 0, one)
        named += units * max(sum(size for _, size in runs), 1)
        end = max([end, *(first + size + step * (units - 1) for first, size in runs)])
    return named, end


def written_out(index: Index | None, count: int) -> tuple[tuple[int, ...], ...] | None:
    """The rows per unit. Raises InputError if they are not those of `count` units of one size."""
    if index is None:
        return None
    units = list(_units(index)) if _count(index) == count else []
    if len(units) != count or len({sum(size for _, size in unit) for unit in units}) != 1:
        raise InputError("the saved units are damaged", "their rows are not those of each unit", "run with --force")
    return tuple(tuple(entry for first, size in unit for entry in range(first, first + size)) for unit in units)


def _count(index: Index) -> int:
    return sum(one.units if isinstance(one, Repeated) else 1 for one in index)


def _units(index: Index) -> Iterator[Unit]:
    for one in index:
        if isinstance(one, Repeated):
            yield from (_moved(one.runs, one.step * number) for number in range(one.units))
        else:
            yield one
