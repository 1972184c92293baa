"""The costs of units, computed from the modules during one forward pass at the shipped shape."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import product
from math import prod
from typing import Any, Literal

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from optin_export.units.capture import capture
from optin_export.units.declare import Producer, Structure, UnitGroup
from optin_export.units.hooks import Convolution, Transposed, get_layer, get_module, get_weight

CostKind = Literal["macs", "params"]


@dataclass(frozen=True)
class Term:
    """`coefficient` times the numbers of units kept in `groups`: one group, or the two on both sides of a layer."""

    coefficient: int
    groups: tuple[str, ...]


@dataclass(frozen=True)
class Costs:
    """MACs of one sample and parameters of the whole model, and the part of them that depends on how many units stay.

    units: group key -> number of units of the unpruned model. unmerged: MACs without token merging, for the costs of a
    model that merges tokens; budgets are shares of them.
    """

    macs: int
    params: int
    units: dict[str, int]
    terms: dict[str, tuple[Term, ...]]
    unmerged: int | None = None

    def whole(self, kind: CostKind) -> int:
        """Cost of the given model, of which budgets are shares."""
        return self.params if kind == "params" else self.macs if self.unmerged is None else self.unmerged

    def of(self, kind: CostKind, kept: Mapping[str, int]) -> int:
        """Cost of the model that keeps this many units per group; groups left out of `kept` keep all."""
        saved = 0
        for term in self.terms[kind]:
            before = prod(self.units[key] for key in term.groups)
            saved += term.coefficient * (before - prod(kept.get(key, self.units[key]) for key in term.groups))
        return (self.macs if kind == "macs" else self.params) - saved

    def per_unit(self, kind: CostKind, kept: Mapping[str, int]) -> dict[str, int]:
        """Cost of one unit of each group while the other groups keep this many units."""
        cost = dict.fromkeys(self.units, 0)
        for term in self.terms[kind]:
            for key in term.groups:
                cost[key] += term.coefficient * prod(kept.get(k, self.units[k]) for k in term.groups if k != key)
        return cost

    def is_linear(self, kind: CostKind) -> bool:
        """Whether every group's cost is independent of what the others keep."""
        return all(len(term.groups) == 1 for term in self.terms[kind])

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def count_macs(model: nn.Module, inputs: dict[str, torch.Tensor]) -> int:
    """MACs of one forward pass: half of torch's FLOP count of matrix products and convolutions."""
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(**inputs)
    return counter.get_total_flops() // 2


def count_params(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def measure_costs(model: nn.Module, structure: Structure, inputs: dict[str, torch.Tensor]) -> Costs:
    """Costs at the shape of `inputs`, which hold one sample (batch 1).

    Per head: 3 t d k + 2 t^2 k + t k d; per neuron 2 t d, for t tokens, hidden size d, head dim k; a convolution of
    kernel area a and p output positions costs p a times its input and its output channels (docs/method.md).
    """
    made: dict[str, list[tuple[UnitGroup, Producer]]] = {}
    read: dict[str, list[UnitGroup]] = {}
    for group in structure.groups:
        for producer in group.producers:
            made.setdefault(producer.path, []).append((group, producer))
        for path in group.reads:
            read.setdefault(path, []).append(group)
    positions, tokens = _shapes(model, sorted({*made, *read}), inputs)
    macs: Counter[tuple[str, ...]] = Counter()
    params: Counter[tuple[str, ...]] = Counter()
    for path in positions:
        layer = get_layer(model, path)
        weight = get_weight(layer)
        area = weight[0, 0].numel() if weight.dim() > 2 else 1
        rows, columns = made.get(path, []), read.get(path, [])
        for group, producer in rows:
            per_unit, norm = group.rows_in(producer), _affine_size(model, producer.norm)
            params[(group.key,)] += per_unit * (producer.fused * (layer.bias is not None) + norm)
        outputs = _parts(len(weight), [(one, producer.fused * one.rows_in(producer)) for one, producer in rows])
        features = _parts(weight.shape[1], [(one, one.width_in(path)) for one in columns])
        for (makers, per_output), (readers, per_feature) in product(outputs, features):
            if makers or readers:
                size = area * per_output * per_feature
                macs[tuple(sorted(makers + readers))] += positions[path] * size
                params[tuple(sorted(makers + readers))] += size
    for group in structure.groups:
        if group.outside is not None:
            macs[(group.key,)] += group.outside
        elif group.kind == "heads" and group.pairwise:
            # Scores and context; the values' tokens may be fewer than the queries'.
            seen = tokens[group.producers[-1].path]
            macs[(group.key,)] += 2 * positions[group.consumer] * seen * group.width
        for table in group.tables:
            parameter = dict(model.named_parameters()).get(table.path)
            if parameter is not None:
                entries = table.entries if table.index is None else len(table.index[0])
                params[(group.key,)] += entries * parameter.numel() // parameter.shape[table.dim]
    for one in structure.attentions:
        # A dimension of all heads: a row of the queries, one of the keys, and a product per pair of tokens.
        layers = [get_layer(model, path) for path in (one.query, one.key)]
        sizes = [layer.weight.shape[1] for layer in layers]
        per_head = positions[one.query] * sum(sizes) + positions[one.query] * tokens[one.key]
        weights = sum(sizes) + sum(layer.bias is not None for layer in layers)
        for total, size in ((macs, per_head), (params, weights)):
            total[(one.heads,)] -= one.count * size
            total[tuple(sorted((one.name, one.heads)))] += size
    return Costs(
        macs=count_macs(model, inputs),
        params=count_params(model),
        units={group.key: group.count for group in structure.searched_groups},
        terms={"macs": _terms(macs), "params": _terms(params)},
    )


def _parts(size: int, groups: Sequence[tuple[UnitGroup, int]]) -> list[tuple[tuple[str, ...], int]]:
    """A dimension of a weight in parts: (group key, entries per unit) of each group, and ((), entries of no unit)."""
    return [
        *(((group.key,), per_unit) for group, per_unit in groups),
        ((), size - sum(group.count * per_unit for group, per_unit in groups)),
    ]


def _terms(coefficients: Counter[tuple[str, ...]]) -> tuple[Term, ...]:
    return tuple(Term(value, keys) for keys, value in sorted(coefficients.items()) if value)


def _affine_size(model: nn.Module, path: str | None) -> int:
    """Parameters per channel of a norm: 2, or 0 without one."""
    return 0 if path is None else sum(1 for _ in get_module(model, path).parameters(recurse=False))


def _shapes(
    model: nn.Module, paths: list[str], inputs: dict[str, torch.Tensor]
) -> tuple[dict[str, int], dict[str, int]]:
    """Per layer: total output positions over all calls, and tokens in the second to last dimension of its input."""
    positions: Counter[str] = Counter()
    tokens: dict[str, int] = {}

    def record(path: str, args: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        layer = get_module(model, path)
        # A transposed convolution multiplies its whole kernel at every position of its input.
        places = args[0] if isinstance(layer, Transposed) else output
        positions[path] += places.numel() // (places.shape[1] if isinstance(layer, Convolution) else places.shape[-1])
        tokens[path] = args[0].shape[-1 if isinstance(get_module(model, path), nn.Conv1d) else -2]

    with capture(model, outputs=dict.fromkeys(paths, record)), torch.no_grad():
        model(**inputs)
    return positions, tokens
