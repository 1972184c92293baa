"""Units of an expansion: channels that one convolution makes, others filter group by group, and another reads."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

from torch import nn

from optin_export.errors import InputError
from optin_export.units.declare import Producer, UnitGroup

#: The libraries' names of the two layers of a squeeze-and-excitation gate.
_GATES = (("conv_reduce", "conv_expand"), ("fc1", "fc2"))


def expansion(
    body: nn.Module, path: str, index: int, residual: Any = None, shortcut: Sequence[str] = ()
) -> tuple[UnitGroup, ...]:
    """The unit groups of a block `body` that runs its modules in the order in which it defines them.

    If the convolutions between are grouped, a unit is one whole group. residual: as in `UnitGroup`, of the block.
    shortcut: modules of the body outside the chain. Raises InputError if something between two layers is not supported.
    """
    gates = _gates(body)
    inside = tuple(f"{name}." for name in (*gates, *shortcut))
    parts = [(name, part) for name, part in body.named_modules() if _has_state(part) and not name.startswith(inside)]
    plain = [at for at, (_, part) in enumerate(parts) if isinstance(part, nn.Conv2d) and part.groups == 1]
    order = [name for name, _ in body.named_modules()]
    groups = []
    for number, (start, end) in enumerate(itertools.pairwise(plain), start=1):
        layers, norms = _chain(parts[start:end], path)
        names = [name for name, _ in layers]
        channels, consumer = layers[0][1].out_channels, parts[end][1]
        count = min([layer.groups for _, layer in layers[1:]], default=channels)
        for name, layer in layers[1:]:
            if layer.groups != count or layer.in_channels != channels or layer.out_channels != channels:
                raise _unknown(f"{path}.{name}", "it does not filter the channels group by group as the others do")
        between = [gate for gate in gates if order.index(names[-1]) < order.index(gate) < order.index(parts[end][0])]
        behind = parts[end + 1 :]
        ends_here = number + 1 == len(plain) and len(behind) == 1 and isinstance(behind[0][1], nn.BatchNorm2d)
        rows = None if count == channels else channels // count
        makers = [*zip(names, norms, strict=True), *((f"{gate}.{gates[gate][1]}", None) for gate in between)]
        groups.append(
            UnitGroup(
                block=index,
                kind="channels",
                part="" if number == 1 else str(number),
                count=count,
                width=channels // count,
                producers=tuple(
                    Producer(f"{path}.{name}", norm=None if norm is None else f"{path}.{norm}", rows=rows)
                    for name, norm in makers
                ),
                consumer=f"{path}.{parts[end][0]}",
                readers=tuple(f"{path}.{gate}.{gates[gate][0]}" for gate in between),
                residual=residual if ends_here else None,
                scale=f"{path}.{behind[0][0]}" if ends_here and residual is not None else None,
                sublayer=None,
            )
        )
        if consumer.in_channels != channels:
            raise _unknown(f"{path}.{parts[end][0]}", f"it does not read what '{names[-1]}' makes")
    return tuple(groups)


def _chain(parts: Sequence[tuple[str, Any]], path: str) -> tuple[list[tuple[str, Any]], list[str | None]]:
    """The convolutions of a stretch that starts with one, and the batch norm after each."""
    layers: list[tuple[str, Any]] = []
    norms: list[str | None] = []
    for name, part in parts:
        if isinstance(part, nn.Conv2d):
            layers.append((name, part))
            norms.append(None)
        elif isinstance(part, nn.BatchNorm2d) and norms[-1] is None:
            norms[-1] = name
        else:
            raise _unknown(f"{path}.{name}", f"a {type(part).__name__} is between its convolutions")
    return layers, norms


def _gates(body: nn.Module) -> dict[str, tuple[str, str]]:
    """Squeeze-and-excitation modules: path -> the layer that reads all channels, the one that gates them."""
    found = {}
    for name, part in body.named_modules():
        pair = next(
            (pair for pair in _GATES if all(isinstance(getattr(part, one, None), nn.Conv2d) for one in pair)), None
        )
        if pair is not None and name:
            found[name] = pair
    return found


def _has_state(module: nn.Module) -> bool:
    return any(True for _ in (*module.parameters(recurse=False), *module.buffers(recurse=False)))


def _unknown(where: str, why: str) -> InputError:
    return InputError(f"'{where}' belongs to a variant of block that cannot be pruned", why, "use a plain variant")
