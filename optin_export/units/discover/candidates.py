"""For every layer: whether its input features fall into units that the layers before it keep apart."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch

from optin_export.units.discover.local_graph import OUTPUT, LocalGraph
from optin_export.units.discover.questions import Answer, Call, Mixed, Questions


@dataclass(frozen=True)
class Candidate:
    """A layer that reads `count` units of `width` consecutive features each.

    rows: layer that makes units -> its features per unit; none for units that other layers make (concatenated inputs).
    tables: parameter -> (dimension, its entries per unit). heads: whether features are mixed within a unit by something
    else than a layer, as attention does.
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


@dataclass
class Feeds:
    """What feeds what. calls: call of a layer -> the calls that feed it. touched: reader -> layer -> bool [its
    features]: whether they reach the reader at all, in any call. The model's output is a reader as well."""

    calls: dict[Call, set[Call]] = field(default_factory=dict)
    touched: dict[str, dict[str, torch.Tensor]] = field(default_factory=dict)

    def add(self, path: str, call: int, questions: Questions) -> None:
        self.calls[path, call] = questions.calls
        known = self.touched.setdefault(path, {})
        for name, features in questions.touched.items():
            known[name] = known.get(name, features) | features

    def readers(self) -> dict[str, set[str]]:
        """Layer -> the layers that it feeds, in any of their calls."""
        found: dict[str, set[str]] = {}
        for reader, sources in self.touched.items():
            for source in sources:
                found.setdefault(source, set()).add(reader)
        return found


def candidates(graph: LocalGraph) -> tuple[dict[str, Candidate], Feeds, list[Leak]]:
    """(candidates by their layer, what feeds them, the reasons why other layers are none)."""
    found: dict[str, Candidate] = {}
    feeds, leaks = Feeds(), list[Leak]()
    for path, calls in graph.reads.items():
        per_call = []
        for call in range(len(calls)):
            questions = Questions(graph, path, call)
            feeds.add(path, call, questions)
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


def inner(leaks: Sequence[Leak], feeds: Feeds) -> tuple[Leak, ...]:
    """The leaks of layers that alone read what feeds them; many layers read a residual stream, which has no units."""
    shared = {reader for several in feeds.readers().values() if len(several) > 1 for reader in several}
    return tuple(one for one in leaks if one.path not in shared)


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
    last = questions.mixed_throughout()
    if last is not None:
        return Leak(path, last)
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
        tables = {name: (dim, answer.entries(name, count)) for name, (dim, _) in answer.tables.items()}
        return Candidate(path, count, width, rows, tables, width > 1 and mixed is not None)
    return None if mixed is None else Leak(path, mixed)


def _widths(features: int) -> Iterator[int]:
    """Possible widths of a unit, the smallest first."""
    yield from (width for width in range(1, features // 2 + 1) if features % width == 0)


def _last(graph: LocalGraph, answer: Answer) -> str:
    return max(answer.layers, key=lambda path: graph.order.get(path, -1))
