"""What each unit costs, read from the modules during one forward pass at the shipped shape."""

from __future__ import annotations

import contextlib
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from optin_export.families._declare import Structure, UnitGroup
from optin_export.families._hooks import get_linear, get_module


@dataclass(frozen=True)
class Costs:
    """MACs of one sample and parameters, for the whole model and per unit of each group (cost is linear in units)."""

    macs: int
    params: int
    macs_per_unit: dict[str, int]
    params_per_unit: dict[str, int]

    def of(self, kind: str) -> tuple[int, dict[str, int]]:
        """(whole model, per unit) in 'macs' or 'params'."""
        return (self.macs, self.macs_per_unit) if kind == "macs" else (self.params, self.params_per_unit)

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

    Per head: 3 t d k + 2 t^2 k + t k d; per neuron 2 t d, for t tokens, hidden size d, head dim k (docs/method.md).
    """
    shapes: dict[str, torch.Size] = {}

    def record(path: str) -> Any:
        def hook(module: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
            shapes[path] = args[0].shape

        return hook

    with contextlib.ExitStack() as stack, torch.no_grad():
        for group in structure.groups:
            stack.callback(get_module(model, group.consumer).register_forward_pre_hook(record(group.consumer)).remove)
        model(**inputs)
    return Costs(
        macs=count_macs(model, inputs),
        params=count_params(model),
        macs_per_unit={group.key: _macs(model, group, shapes[group.consumer]) for group in structure.groups},
        params_per_unit={group.key: _params(model, group) for group in structure.groups},
    )


def _macs(model: nn.Module, group: UnitGroup, shape: torch.Size) -> int:
    tokens = shape[-2]
    positions = shape[:-1].numel()  # of all windows, where attention runs in windows
    rows = sum(producer.fused * get_linear(model, producer.path).in_features for producer in group.producers)
    linear = positions * group.width * (rows + get_linear(model, group.consumer).out_features)
    return linear + (2 * positions * tokens * group.width if group.kind == "heads" else 0)


def _params(model: nn.Module, group: UnitGroup) -> int:
    total = get_linear(model, group.consumer).out_features * group.width
    for producer in group.producers:
        linear = get_linear(model, producer.path)
        total += producer.fused * group.width * (linear.in_features + (linear.bias is not None))
    return total
