"""Unit groups of a model, found by measurement, in blocks."""

from __future__ import annotations

import dataclasses
import itertools
import traceback
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from optin_export.errors import InputError
from optin_export.units.declare import Producer, Refusal, Table, UnitGroup, UnitKind
from optin_export.units.discover.candidates import Leak, candidates, inner
from optin_export.units.discover.components import STREAM, Component, Obstacle, components
from optin_export.units.discover.local_graph import local_graph, mixes
from optin_export.units.discover.residuals import Streams, observe_streams
from optin_export.units.hooks import Convolution, get_layer, get_weight
from optin_export.units.passes import constant_inputs, few_rows
from optin_export.units.probes import without_zeros

#: The name of such units in the report, next to the names of families.
NAME = "discovered"
#: The folder of this package.
_PACKAGE = Path(__file__).resolve().parents[2]
#: Why units whose reader gets the same for every row stay.
CONSTANT = "what it reads is the same for every row, so an engine may compute it once, and would not be faster"


@dataclass(frozen=True)
class Discovered:
    """blocks: path -> its groups, whose `block` is 0; in running order. channels_first: blocks with channels first.

    refusals: units that are kept apart by some layers, but cannot be removed. mixed: layers whose input would be units
    if nothing mixed them. left_out: why other units stay without a refusal, such as channels of residual streams; these
    first.
    """

    blocks: dict[str, tuple[UnitGroup, ...]]
    channels_first: frozenset[str]
    refusals: tuple[Refusal, ...]
    mixed: tuple[Leak, ...] = ()
    left_out: tuple[Obstacle, ...] = ()


def _is_ours(error: Exception) -> bool:
    """Whether this package's own code raised it, and not torch or the model."""
    frames = traceback.extract_tb(error.__traceback__)
    return not isinstance(error, RuntimeError) and Path(frames[-1].filename).is_relative_to(_PACKAGE)


def discover_groups(
    model: nn.Module, inputs: Mapping[str, torch.Tensor], known: Collection[UnitGroup] = ()
) -> Discovered:
    """Find the groups of units of a model by gradients between its layers, on the first two rows of `inputs`.

    known: groups that are declared; units of the layers that make or read theirs are left out. Raises InputError if the
    model does not run with gradients.
    """
    two = few_rows(model, inputs, rows=2)
    few = {name: tensor[:1] for name, tensor in two.items()}
    try:
        with without_zeros(model), local_graph(model, few) as graph:
            found, feeds, leaks = candidates(graph)
            mixed = inner(leaks, feeds)
            made, obstacles = components(graph, found, feeds)
            made = [one for one in made if not _is_known(one, known)]
            blocks = _blocks(model, made)
            order = graph.order
    except InputError:
        raise
    except Exception as error:  # a model's own code may raise anything, also in its backward pass
        if _is_ours(error):
            raise
        said = str(error) if isinstance(error, RuntimeError) else f"{type(error).__name__}: {error}"
        raise InputError(
            "the units of the model cannot be found by measurement",
            f"gradients cannot be computed through it: {said}"[:300],
            "remove operations that overwrite tensors in place or that detach them, or declare a family",
        ) from None
    constant = constant_inputs(model, two, [one.readers[-1] for one in made])
    obstacles += [Obstacle(one.readers[-1], CONSTANT, one.heads) for one in made if one.readers[-1] in constant]
    kept = [(one, block) for one, block in zip(made, blocks, strict=True) if one.readers[-1] not in constant]
    streams = observe_streams(model, few, {one.readers[-1]: block for one, block in kept})
    groups: dict[str, list[UnitGroup]] = {}
    for one, block in kept:
        groups.setdefault(block, []).append(_group(model, one, streams))
    ordered = sorted(groups, key=lambda block: min(order[group.consumer] for group in groups[block]))
    return Discovered(
        {block: _numbered(groups[block]) for block in ordered},
        frozenset(block for block in ordered if streams.is_channels_first(block)),
        tuple(_refusals(obstacles, {path for group in known for path in group.reads})),
        mixed,
        tuple(sorted((one for one in obstacles if one.quiet), key=lambda one: one.why != STREAM)),
    )


def _group(model: nn.Module, component: Component, streams: Streams) -> UnitGroup:
    modules = {path: model.get_submodule(path) for path in component.rows}
    producers: list[Producer] = []
    tables = [_table(model, name, dim, units) for name, (dim, units) in component.tables.items()]
    for path, units in component.rows.items():
        if isinstance(modules[path], nn.Linear | Convolution):
            producer = _producer(path, units, len(get_weight(get_layer(model, path))))
            producers.append(dataclasses.replace(producer, keeps_inputs=path in component.loose))
            continue
        norm = modules[path]
        before = producers[-1] if producers else None
        if before is not None and before.norm is None and _is_norm_of(norm, before, component.rows[before.path], units):
            producers[-1] = dataclasses.replace(before, norm=path)
            tables = [one for one in tables if one.path.rpartition(".")[0] != path]
        else:
            named = [name for name, one in norm.state_dict(keep_vars=True).items() if one.dim() == 1]
            tables = [one for one in tables if one.path.rpartition(".")[0] != path]
            tables += [_table(model, f"{path}.{name}", 0, units) for name in named]
    inside = {f"{path}." for path, module in modules.items() if isinstance(module, Convolution)}
    tables = [one for one in tables if not one.path.startswith(tuple(inside))]
    consumer = component.readers[-1]
    kind: UnitKind = "heads" if component.heads else "channels" if _has_channels(model, component) else "neurons"
    residual, scale, arrange = streams.residual(consumer)
    parallel = None if residual is not None else streams.parallel(consumer)
    added: tuple[str, ...] = ()
    if parallel is not None:
        residual, added = parallel
    return UnitGroup(
        block=0,
        kind=kind,
        count=component.count,
        width=component.width,
        producers=tuple(producers),
        consumer=consumer,
        columns=tuple(_columns(model, component)),
        readers=component.readers[:-1],
        residual=residual,
        scale=scale,
        arrange=arrange,
        added=added,
        sublayer=None,
        tables=tuple(tables),
        found=True,
    )


def _is_norm_of(
    norm: nn.Module, maker: Producer, rows: Sequence[Sequence[int]], units: Sequence[Sequence[int]]
) -> bool:
    """Whether a norm has exactly the units' rows of the layer before it."""
    features = sorted(row for unit in units for row in unit)
    return list(rows) == list(units) and features == list(range(len(norm.state_dict()["running_mean"])))


def _columns(model: nn.Module, component: Component) -> Iterator[tuple[str, tuple[tuple[int, ...], ...]]]:
    """The readers' input features per unit, where they are not slices of `width` of all their features."""
    for path, units in component.columns.items():
        every = [feature for unit in units for feature in unit]
        features = get_weight(get_layer(model, path)).shape[1]
        if len(units[0]) != component.width or every != list(range(features)):
            yield path, tuple(tuple(unit) for unit in units)


def _producer(path: str, units: Sequence[Sequence[int]], rows: int) -> Producer:
    """The producer with its rows as slabs if all its rows are such slabs, otherwise one by one."""
    per_unit, count = len(units[0]), len(units)
    for fused in range(1, per_unit + 1):
        size, rest = divmod(per_unit, fused)
        if rest:
            continue
        wanted = [
            [slab * count * size + unit * size + row for slab in range(fused) for row in range(size)]
            for unit in range(count)
        ]
        if [list(unit) for unit in units] == wanted and rows == count * per_unit:
            return Producer(path, fused=fused, rows=size)
        if fused == 4:
            break
    return Producer(path, rows=None, index=tuple(tuple(unit) for unit in units))


def _table(model: nn.Module, name: str, dim: int, units: Sequence[Sequence[int]]) -> Table:
    owner, _, leaf = name.rpartition(".")
    entries, size = len(units[0]), getattr(model.get_submodule(owner), leaf).shape[dim]
    if [entry for unit in units for entry in unit] == list(range(size)):
        return Table(name, dim, entries)
    return Table(name, dim, index=tuple(tuple(unit) for unit in units))


def _has_channels(model: nn.Module, component: Component) -> bool:
    """Whether convolutions make or read the units; filters of neurons between linear layers do not count."""
    return any(isinstance(model.get_submodule(path), Convolution) for path in _layers(model, component))


def _numbered(groups: Sequence[UnitGroup]) -> tuple[UnitGroup, ...]:
    """Number several groups of one kind in one block."""
    counts: dict[str, int] = {}
    numbered = []
    for group in groups:
        number = counts[group.kind] = counts.get(group.kind, 0) + 1
        numbered.append(group if number == 1 else dataclasses.replace(group, part=str(number)))
    return tuple(numbered)


def _blocks(model: nn.Module, made: Sequence[Component]) -> list[str]:
    """Per component, the module that is its block: the nearest element of a list or sequence of modules around all its
    layers, if it is not around other such elements; otherwise the element around its last reader, or that reader."""
    around = [_nearest_element(model, _layers(model, one)) for one in made]
    elements = {path for path in around if path is not None}
    elements = {path for path in elements if not any(other.startswith(f"{path}.") for other in elements)}
    blocks = []
    for one, path in zip(made, around, strict=True):
        reader = one.readers[-1]
        outer = next((element for element in elements if reader.startswith(f"{element}.")), reader)
        blocks.append(path if path in elements else outer)
    return blocks


def _layers(model: nn.Module, component: Component) -> list[str]:
    makers = [path for path in component.rows if mixes(model.get_submodule(path)) or path in component.loose]
    return [*makers, *component.readers]


def _nearest_element(model: nn.Module, paths: Iterable[str]) -> str | None:
    split = [path.split(".") for path in paths]
    common = [parts[0] for parts in itertools.takewhile(lambda parts: len(set(parts)) == 1, zip(*split, strict=False))]
    for end in range(len(common), 0, -1):
        parent = model.get_submodule(".".join(common[: end - 1]))
        module = model.get_submodule(".".join(common[:end]))
        layer = isinstance(module, nn.Linear | Convolution)
        if isinstance(parent, nn.ModuleList | nn.Sequential | nn.ModuleDict) and not layer and _is_called(module):
            return ".".join(common[:end])
    return None


def _is_called(module: nn.Module) -> bool:
    return not isinstance(module, nn.ModuleList | nn.ModuleDict)


def _is_known(component: Component, known: Iterable[UnitGroup]) -> bool:
    made = {path for group in known for one in group.producers for path in (one.path, one.norm)}
    read = {path for group in known for path in group.reads}
    return bool(made & set(component.rows) or read & set(component.readers))


def _refusals(obstacles: Sequence[Obstacle], taken: Collection[str]) -> list[Refusal]:
    found = []
    for one in obstacles:
        if one.quiet or one.path in taken:
            continue
        kind: UnitKind = "heads" if one.heads else "neurons"
        found.append(
            Refusal(kind, InputError(f"the {kind} that '{one.path}' reads cannot be removed", one.why, "leave them"))
        )
    return found
