"""Combine layers that read the same units into groups that can be removed as a whole, or say why they cannot."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from optin_export.units.discover.candidates import Candidate, Feeds
from optin_export.units.discover.local_graph import OUTPUT, LocalGraph, feature_dim, is_grouped, mixes
from optin_export.units.discover.questions import Call
from optin_export.units.hooks import Layer, Transposed

Tables = dict[str, tuple[int, list[list[int]]]]
#: (side, layer, number): an output feature of a maker, or a unit of a reader.
Feature = tuple[str, str, int]
_Norm = nn.BatchNorm1d | nn.BatchNorm2d | nn.BatchNorm3d
#: Why units of a stream that layers add to stay.
STREAM = "they are channels of a residual stream"
_MAKER, _READER = "maker", "reader"


@dataclass(frozen=True)
class Component:
    """Units with all layers that make and read them, both in running order.

    rows: maker -> its features per unit; among them norms and grouped convolutions. tables: parameter -> (dimension,
    entries per unit). columns: reader -> its input features per unit. loose: the grouped convolutions among the makers
    whose input features are no units.
    """

    count: int
    rows: dict[str, list[list[int]]]
    tables: Tables
    readers: tuple[str, ...]
    columns: dict[str, list[list[int]]]
    heads: bool
    loose: frozenset[str] = frozenset()

    @property
    def width(self) -> int:
        """Input features per unit of the last reader."""
        return len(self.columns[self.readers[-1]][0])


@dataclass(frozen=True)
class Obstacle:
    """Why the units that `path` reads cannot be removed. quiet: they are channels of a residual stream, as expected."""

    path: str
    why: str
    heads: bool
    quiet: bool = False


class _Classes:
    """Features of makers and inputs of readers that belong to one unit, joined step by step (union-find)."""

    def __init__(self) -> None:
        self.parent: dict[Feature, Feature] = {}

    def root(self, one: Feature) -> Feature:
        parent = self.parent
        found = one
        while (above := parent.setdefault(found, found)) != found:
            found = above
        while parent[one] != found:
            parent[one], one = found, parent[one]
        return found

    def join(self, one: Feature, other: Feature) -> None:
        self.parent[self.root(other)] = self.root(one)

    def members(self) -> dict[Feature, list[Feature]]:
        found: dict[Feature, list[Feature]] = {}
        for one in self.parent:
            found.setdefault(self.root(one), []).append(one)
        return found


def components(
    graph: LocalGraph, found: Mapping[str, Candidate], feeds: Feeds
) -> tuple[list[Component], list[Obstacle]]:
    """Groups of units, the first in running order first, and the reasons why other candidates are none."""
    classes = _Classes()
    for path, one in found.items():
        for maker, units in one.rows.items():
            if not _is_lookup(graph.module(maker)):
                for at, rows in enumerate(units):
                    for row in rows:
                        classes.join((_READER, path, at), (_MAKER, maker, row))
    for path in feeds.touched:
        if path in found and is_grouped(graph.module(path)):
            _join_groups(classes, graph.module(path), path, found[path])
    alike: dict[tuple[Any, ...], list[_Unit]] = {}
    grouped = {path for path in (*feeds.touched, *graph.makes) if path != OUTPUT and is_grouped(graph.module(path))}
    for members in classes.members().values():
        unit = _Unit.of(members, grouped)
        if unit.reads:
            alike.setdefault(unit.signature(), []).append(unit)
    mixing = _mixing(found, feeds)
    made, obstacles = list[Component](), list[Obstacle]()
    upstream = _Upstream(feeds.calls)
    for several in alike.values():
        result = _joined(graph, found, feeds, mixing, upstream, several)
        (made if isinstance(result, Component) else obstacles).append(result)  # type: ignore[arg-type]
    made.sort(key=lambda one: (graph.order[one.readers[-1]], min(one.columns[one.readers[-1]])))
    return _without_shared(made, obstacles), obstacles


def _join_groups(classes: _Classes, module: Any, path: str, one: Candidate) -> None:
    """Join what a grouped convolution reads in a group with what it makes there."""
    inputs, outputs = module.in_channels // module.groups, module.out_channels // module.groups
    for row in range(module.out_channels):
        classes.join((_MAKER, path, row // outputs * outputs), (_MAKER, path, row))
    for feature in range(module.in_channels):
        classes.join((_MAKER, path, feature // inputs * outputs), (_READER, path, feature // one.width))


@dataclass(frozen=True)
class _Unit:
    """rows: maker -> its features. reads: reader -> the numbers of the unit there."""

    rows: dict[str, list[int]]
    reads: dict[str, list[int]]

    @classmethod
    def of(cls, members: Iterable[Feature], grouped: Collection[str]) -> _Unit:
        rows, reads = dict[str, list[int]](), dict[str, list[int]]()
        for side, path, number in sorted(members):
            (rows if side == _MAKER else reads).setdefault(path, []).append(number)
        return cls(rows, {path: units for path, units in reads.items() if path not in grouped})

    def signature(self) -> tuple[Any, ...]:
        """Units are alike if the same layers make and read them, each as many features."""
        sides = (self.rows, self.reads)
        return tuple(tuple((name, len(one)) for name, one in sorted(side.items())) for side in sides)


def _mixing(found: Mapping[str, Candidate], feeds: Feeds) -> dict[str, list[tuple[str, set[int]]]]:
    """Maker -> (reader, the features of the maker that reach it, but not as a unit)."""
    mixing: dict[str, list[tuple[str, set[int]]]] = {}
    for reader, sources in feeds.touched.items():
        for maker, touched in sources.items():
            own = found[reader].rows.get(maker, []) if reader in found else []
            rest = set(touched.nonzero().flatten().tolist()) - {row for rows in own for row in rows}
            if rest:
                mixing.setdefault(maker, []).append((reader, rest))
    return mixing


def _joined(
    graph: LocalGraph,
    found: Mapping[str, Candidate],
    feeds: Feeds,
    mixing: Mapping[str, list[tuple[str, set[int]]]],
    upstream: _Upstream,
    units: list[_Unit],
) -> Component | Obstacle:
    """The component of units that are alike, or why they cannot be removed."""
    readers = sorted(units[0].reads, key=lambda one: graph.order[one])
    makers = sorted(units[0].rows, key=lambda one: graph.order[one])
    last = readers[-1]
    # Attention mixes before layers of single positions.
    pointwise = set(getattr(graph.module(last), "kernel_size", (1,))) == {1}
    heads = pointwise and any(found[one].heads for one in readers)
    loose = frozenset(name for name in makers if is_grouped(graph.module(name)) and name not in found)
    why = _why_not(graph, mixing, makers, readers, units, loose)
    if why is not None:
        return Obstacle(last, why, heads, quiet=not heads or len(units) < 2)
    units = sorted(units, key=lambda one: one.reads[last])
    columns = {
        path: [[at * found[path].width + offset for at in one.reads[path] for offset in range(found[path].width)]
               for one in units]
        for path in readers
    }  # fmt: skip
    rows = {name: [one.rows[name] for one in units] for name in makers}
    makes = [name for name in makers if mixes(graph.module(name)) or name in loose]
    filters = any(is_grouped(graph.module(name)) and name not in loose for name in makers)
    heads = heads and not filters and max(len(rows[name][0]) for name in makes) > 1
    tables = _tables(graph, found, feeds, readers, units)
    component = Component(len(units), rows, tables, tuple(readers), columns, heads, loose)
    if _is_stream(graph, component, feeds.calls, upstream):
        return Obstacle(last, STREAM, heads, quiet=True)
    return component


def _why_not(
    graph: LocalGraph,
    mixing: Mapping[str, list[tuple[str, set[int]]]],
    makers: list[str],
    readers: list[str],
    units: list[_Unit],
    loose: Collection[str],
) -> str | None:
    for maker in makers:
        own = {row for unit in units for row in unit.rows[maker]}
        for reader, features in mixing.get(maker, ()):
            if own & features and reader == OUTPUT:
                return f"the output of '{maker}' is also an output of the model"
            if own & features:
                return f"'{reader}' reads '{maker}' without keeping these units apart"
    for name in (*makers, *readers):
        module = graph.module(name)
        if not isinstance(module, Layer | _Norm) or (isinstance(module, Transposed) and module.groups > 1):
            return f"'{name}' is a {type(module).__name__}"
    filters = next((name for name in makers if name in loose and not _is_torchs(graph.module(name))), None)
    if filters is not None:
        return f"'{filters}' filters features that are no units, by code of its own"
    if not any(mixes(graph.module(name)) or name in loose for name in makers):
        return "no layer makes them alone"
    return "there is only one of them, whose features can only go together" if len(units) < 2 else None


def _tables(
    graph: LocalGraph, found: Mapping[str, Candidate], feeds: Feeds, readers: Sequence[str], units: Sequence[_Unit]
) -> Tables:
    """Parameters with entries for each of the units, and tables of lookups that only these readers read."""
    entries: dict[str, tuple[int, list[set[int]]]] = {}
    read_by = feeds.readers()
    for path in readers:
        one = found[path]
        every = dict(one.tables)
        # A table that layers of other units read as well stays whole, and those that read it select its entries.
        lookups = {name: rows for name, rows in one.rows.items() if _is_lookup(graph.module(name))}
        every |= {f"{name}.weight": (1, rows) for name, rows in lookups.items() if read_by[name] <= set(readers)}
        for name, (dim, of_unit) in every.items():
            known = entries.setdefault(name, (dim, [set() for _ in units]))[1]
            for unit, own in zip(units, known, strict=True):
                own.update(entry for at in unit.reads[path] for entry in of_unit[at])
    return {
        name: (dim, [sorted(own) for own in known])
        for name, (dim, known) in entries.items()
        if len({len(own) for own in known}) == 1 and known[0]
    }


def _is_lookup(module: nn.Module) -> bool:
    """Whether the features of a unit are columns of a table (position biases by head)."""
    return isinstance(module, nn.Embedding)


def _is_torchs(module: nn.Module) -> bool:
    return type(module).forward in (nn.Conv1d.forward, nn.Conv2d.forward, nn.Conv3d.forward)


class _Upstream:
    """All calls from which a call is computed."""

    def __init__(self, feeds: Mapping[Call, set[Call]]) -> None:
        self.feeds, self.known = feeds, dict[Call, set[Call]]()

    def of(self, call: Call) -> set[Call]:
        if call not in self.known:
            todo, found = [call], set[Call]()
            while todo:
                new = self.feeds.get(todo.pop(), set()) - found
                found |= new
                todo += new
            self.known[call] = found
        return self.known[call]


def _is_stream(graph: LocalGraph, component: Component, feeds: Mapping[Call, set[Call]], upstream: _Upstream) -> bool:
    """Whether a layer that makes the units is computed from them, and is added to them.

    A gate (squeeze-and-excitation) is computed from them as well, but has one value for all positions. In a block that
    runs several times, the units of one call are computed from those of another, but not added to them. A layer may
    also be computed from other features of the same maker (a split).
    """
    positions = {
        name: max(one.numel() // one.shape[feature_dim(graph.module(name), one)] for one in graph.makes[name])
        for name in component.rows
    }
    several = max(positions.values()) > 1
    reading = {call for call in feeds if call[0] in component.readers}
    for reader in reading:
        added = {one for one in feeds[reader] if one[0] in component.rows and not (several and positions[one[0]] == 1)}
        for one in added:
            before = {one} | upstream.of(one)
            if any(feeds[call] & (added & before - {one}) for call in before & reading):
                return True
    return False


def _without_shared(made: list[Component], obstacles: list[Obstacle]) -> list[Component]:
    """The components that share no entry of a table with another."""
    users: dict[tuple[str, int], list[Component]] = {}
    for one in made:
        for name, (_, entries) in one.tables.items():
            for entry in {entry for own in entries for entry in own}:
                users.setdefault((name, entry), []).append(one)
    kept = []
    for one in made:
        names = ((name, entry) for name, (_, entries) in one.tables.items() for own in entries for entry in own)
        shared = next((name for name in names if len(users[name]) > 1), None)
        if shared is None:
            kept.append(one)
            continue
        others = [other.readers[-1] for other in users[shared] if other is not one]
        why = f"they share '{shared[0]}' with the units that '{others[0]}' reads"
        obstacles.append(Obstacle(one.readers[-1], why, one.heads))
    return kept
