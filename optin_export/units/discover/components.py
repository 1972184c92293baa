"""Combine layers that read the same units into groups that can be removed as a whole, or say why they cannot."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass

from torch import nn

from optin_export.units.discover.candidates import Candidate, readers_of
from optin_export.units.discover.local_graph import OUTPUT, LocalGraph, feature_dim, filters, mixes
from optin_export.units.discover.questions import Call
from optin_export.units.hooks import Convolution

Tables = dict[str, tuple[int, list[list[int]]]]


@dataclass(frozen=True)
class Component:
    """Units with all layers that make and read them, both in running order.

    rows: maker -> its features per unit; among them norms and grouped convolutions. tables: parameter -> (dimension,
    entries per unit). readers: layers that read the units, each in slices of `width` features.
    """

    count: int
    width: int
    rows: dict[str, list[list[int]]]
    tables: Tables
    readers: tuple[str, ...]
    heads: bool


@dataclass(frozen=True)
class Obstacle:
    """Why the units that `path` reads cannot be removed. quiet: they are channels of a residual stream, as expected."""

    path: str
    why: str
    heads: bool
    quiet: bool = False


def components(
    graph: LocalGraph, found: Mapping[str, Candidate], feeds: Mapping[Call, set[Call]]
) -> tuple[list[Component], list[Obstacle]]:
    """Groups of units, the first in running order first, and the reasons why other candidates are none."""
    readers = readers_of(feeds)
    made: list[Component] = []
    obstacles: list[Obstacle] = []
    done: set[str] = set()
    for path in sorted(found, key=lambda one: -graph.order[one]):
        if path in done:
            continue
        result = _closed(graph, found, readers, path)
        done.add(path)
        if isinstance(result, Component):
            done.update(result.readers)
            if _is_stream(graph, result, feeds):
                obstacles.append(Obstacle(path, "they are channels of a residual stream", result.heads, quiet=True))
                continue
            made.append(result)
        else:
            obstacles.append(dataclasses.replace(result, quiet=not result.heads))
    return _without_shared(sorted(made, key=lambda one: graph.order[one.readers[-1]]), obstacles), obstacles


def _closed(
    graph: LocalGraph, found: Mapping[str, Candidate], readers_by_layer: Mapping[str, set[str]], path: str
) -> Component | Obstacle:
    """Add all other readers of the layers that make these units, and all makers that those read, until none is left."""
    start = found[path]
    rows, tables, readers = dict(start.rows), dict(start.tables), {path}
    todo = [name for name in rows if not _is_lookup(graph.module(name))]
    while todo:
        maker = todo.pop()
        for reader in readers_by_layer.get(maker, ()):
            if reader in readers:
                continue
            if reader == OUTPUT:
                return Obstacle(path, f"the output of '{maker}' is also an output of the model", start.heads)
            other = found.get(reader)
            if other is None or maker not in other.rows:
                return Obstacle(path, f"'{reader}' reads '{maker}' without keeping these units apart", start.heads)
            if other.count != start.count or other.rows[maker] != rows[maker]:
                return Obstacle(path, f"'{reader}' reads '{maker}' in other units", start.heads)
            for name, units in other.rows.items():
                if rows.setdefault(name, units) != units:
                    return Obstacle(path, f"'{reader}' reads '{name}' in other units", start.heads)
                if name not in start.rows and not _is_lookup(graph.module(name)):
                    todo.append(name)
            tables |= other.tables
            readers.add(reader)
    ordered = sorted(readers, key=lambda one: graph.order[one])
    if len({found[one].width for one in ordered}) > 1:
        return Obstacle(path, "its readers see units of several widths", start.heads)
    lookups = {name: rows.pop(name) for name in list(rows) if _is_lookup(graph.module(name))}
    # A table that layers of other units read as well stays whole, and those that read it select its entries.
    tables |= {f"{name}.weight": (1, units) for name, units in lookups.items() if readers_by_layer[name] <= readers}
    makers = {name: rows[name] for name in sorted(rows, key=lambda one: graph.order[one])}
    for name in (*makers, *ordered):
        module = graph.module(name)
        if not isinstance(module, nn.Linear | Convolution | nn.BatchNorm1d | nn.BatchNorm2d):
            return Obstacle(path, f"'{name}' is a {type(module).__name__}", start.heads)
    makes = [name for name in makers if mixes(graph.module(name))]
    if not makes:
        return Obstacle(path, "no layer makes them alone", start.heads)
    grouped = any(filters(graph.module(name)) and not _is_norm(graph.module(name)) for name in makers)
    heads = start.heads and not grouped and max(len(makers[name][0]) for name in makes) > 1
    return Component(start.count, start.width, makers, tables, tuple(ordered), heads)


def _is_lookup(module: nn.Module) -> bool:
    """Whether the features of a unit are columns of a table (position biases by head)."""
    return isinstance(module, nn.Embedding)


def _is_norm(module: nn.Module) -> bool:
    return isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d)


def _is_stream(graph: LocalGraph, component: Component, feeds: Mapping[Call, set[Call]]) -> bool:
    """Whether a layer that makes the units is computed from them, and is added to them.

    A gate (squeeze-and-excitation) is computed from them as well, but has one value for all positions. In a block that
    runs several times, the units of one call are computed from those of another, but not added to them.
    """
    positions = {
        name: max(one.numel() // one.shape[feature_dim(graph.module(name), one)] for one in graph.makes[name])
        for name in component.rows
    }
    several = max(positions.values()) > 1
    for reader, sources in feeds.items():
        if reader[0] not in component.readers:
            continue
        added = {one for one in sources if one[0] in component.rows and not (several and positions[one[0]] == 1)}
        if any(feeds.get(before, set()) & added for one in added for before in _upstream(one, feeds)):
            return True
    return False


def _upstream(call: Call, feeds: Mapping[Call, set[Call]]) -> set[Call]:
    """All calls from which this one is computed."""
    todo, found = [call], set[Call]()
    while todo:
        for source in feeds.get(todo.pop(), ()):
            if source not in found:
                found.add(source)
                todo.append(source)
    return found


def _without_shared(made: list[Component], obstacles: list[Obstacle]) -> list[Component]:
    """The components that share no layer or table with another."""
    users: dict[str, list[Component]] = {}
    for one in made:
        for name in (*one.rows, *one.tables):
            users.setdefault(name, []).append(one)
    kept = []
    for one in made:
        shared = next((name for name in (*one.rows, *one.tables) if len(users[name]) > 1), None)
        if shared is None:
            kept.append(one)
            continue
        others = [other.readers[-1] for other in users[shared] if other is not one]
        why = f"they share '{shared}' with the units that '{others[0]}' reads"
        obstacles.append(Obstacle(one.readers[-1], why, one.heads))
    return kept
