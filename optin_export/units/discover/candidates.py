"""For every layer: whether its input features fall into units that the layers before it keep apart."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from optin_export.units.discover.local_graph import OUTPUT, LocalGraph
from optin_export.units.discover.questions import Answer, Call, Mixed, Questions


@dataclass(frozen=True)
class Candidate:
    """A layer that reads `count` units of `width` consecutive features each.

    rows: layer that makes units -> its features per unit. tables: parameter -> (dimension, its entries per unit).
    heads: whether features are mixed within a unit by something else than a layer, as attention does.
    """

    path: str
    count: int
    width: int
    rows: dict[str, list[list[int]]]
    tables: dict[str, tuple[int, list[list[int]]]]
    heads: bool


@dataclass(frozen=True)
class Leak:
    """Why a layer's input has no units: `source` reaches several or all of its features."""

    path: str
    source: str


def candidates(graph: LocalGraph) -> tuple[dict[str, Candidate], dict[Call, set[Call]], list[Leak]]:
    """(candidates by their layer, call of a layer -> calls that feed it, the reasons why others are none)."""
    found: dict[str, Candidate] = {}
    feeds: dict[Call, set[Call]] = {}
    leaks: list[Leak] = []
    for path, calls in graph.reads.items():
        per_call = []
        for call in range(len(calls)):
            questions = Questions(graph, path, call)
            feeds[path, call] = questions.calls
            if path != OUTPUT:
                per_call.append(_candidate(graph, path, questions))
        if not per_call:
            continue
        separate = [one for one in per_call if isinstance(one, Candidate)]
        if len(separate) == len(per_call) and (merged := _merged(separate)) is not None:
            found[path] = merged
        elif isinstance(per_call[0], Leak):
            leaks.append(per_call[0])
    return found, feeds, leaks


def inner(leaks: Sequence[Leak], feeds: Mapping[Call, set[Call]]) -> tuple[Leak, ...]:
    """The leaks of layers that alone read what feeds them; many layers read a residual stream, which has no units."""
    readers = readers_of(feeds)
    shared = {reader for several in readers.values() if len(several) > 1 for reader in several}
    return tuple(one for one in leaks if one.path not in shared)


def readers_of(feeds: Mapping[Call, set[Call]]) -> dict[str, set[str]]:
    """Layer -> the layers that it feeds, in any of their calls."""
    readers: dict[str, set[str]] = {}
    for (reader, _), sources in feeds.items():
        for source, _ in sources:
            readers.setdefault(source, set()).add(reader)
    return readers


def _merged(calls: list[Candidate]) -> Candidate | None:
    """One candidate of several calls that read the same units from different layers; None if they differ."""
    rows: dict[str, list[list[int]]] = {}
    for one in calls:
        if (one.count, one.width) != (calls[0].count, calls[0].width):
            return None
        for path, features in one.rows.items():
            if rows.setdefault(path, features) != features:
                return None
    tables = {name: table for one in calls for name, table in one.tables.items()}
    return Candidate(calls[0].path, calls[0].count, calls[0].width, rows, tables, any(one.heads for one in calls))


def _candidate(graph: LocalGraph, path: str, questions: Questions) -> Candidate | Leak | None:
    if not questions.sources or not questions.layers:
        return None
    mixed: str | None = None
    for width in _widths(questions.features):
        leak = questions.leak(width)
        if leak is not None:
            mixed = leak
            continue
        try:
            answer = questions.answer(width)
        except Mixed as error:
            mixed = str(error)
            continue
        count = questions.features // width
        rows = {name: answer.rows(name, count) for name in answer.layers}
        rows = {name: units for name, units in rows.items() if any(units)}
        if not rows:
            return Leak(path, _last(graph, answer))
        uneven = next((name for name, units in rows.items() if len({len(one) for one in units}) > 1), None)
        if uneven is not None:
            mixed = uneven
            continue
        tables = {name: (dim, answer.entries(name, count)) for name, (dim, _) in answer.tables.items()}
        tables = {name: table for name, table in tables.items() if len({len(one) for one in table[1]}) == 1}
        return Candidate(path, count, width, rows, tables, width > 1 and mixed is not None)
    return None if mixed is None else Leak(path, mixed)


def _widths(features: int) -> Iterator[int]:
    """Possible widths of a unit, the smallest first."""
    yield from (width for width in range(1, features // 2 + 1) if features % width == 0)


def _last(graph: LocalGraph, answer: Answer) -> str:
    return max(answer.layers, key=lambda path: graph.order.get(path, -1))
