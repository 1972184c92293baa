"""Find the residual streams next to layers: tensors h with h + f * (layer's output) = another tensor of the pass.

f is 1, or the factors of a layer scale. h is the first argument of a module that runs before the layer.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import nn

from optin_export.units.capture import capture
from optin_export.units.hooks import Convolution
from optin_export.units.outputs import tensors_in

#: Relative difference up to which two tensors are the same.
TOLERANCE = 1e-5
#: Number of modules before and after a layer whose inputs are compared.
NEAR = 40
#: Entries that are compared first.
FEW = 64
Residual = tuple[str, int | Literal["output", "call"]]


@dataclass
class Streams:
    """What modules read and returned in one pass, in running order.

    events: (module, its first argument as it began). outputs: layer -> its only output. results: block -> output.
    """

    model: nn.Module
    block_of: Mapping[str, str]
    events: list[tuple[str, torch.Tensor]] = field(default_factory=list)
    outputs: dict[str, tuple[int, torch.Tensor]] = field(default_factory=dict)
    results: dict[str, tuple[int, torch.Tensor]] = field(default_factory=dict)
    repeated: set[str] = field(default_factory=set)

    @torch.no_grad()
    def parallel(self, layer: str) -> tuple[Residual, tuple[str, ...]] | None:
        """(the residual stream h, the layers that ran before it and are added as well), if another layer of the block
        reads h too, and the sum of all is the next value of the stream: h + o1 + o2."""
        block = self.block_of[layer]
        for other, (at, output) in self.outputs.items():
            if other == layer or layer not in self.outputs or self.block_of[other] != block:
                continue
            own_at, own = self.outputs[layer]
            if own.shape != output.shape or self.repeated & {layer, other}:
                continue
            stream = self._stream(block, own + output, min(at, own_at), max(at, own_at))
            if stream is not None:
                return stream, (other,) if list(self.outputs).index(other) < list(self.outputs).index(layer) else ()
        return None

    def _stream(self, block: str, added: torch.Tensor, first: int, last: int) -> Residual | None:
        """Where h was seen before event `first`, for h + added = a tensor that is read after event `last`."""
        _, result = self.results.get(block, (0, None))
        sums = [tensor for _, tensor in self.events[last : last + NEAR]] + ([] if result is None else [result])
        before = [one for one in self.events[max(0, first - NEAR) : first] if self._is_usable(one[0], block)]
        for total in sums:
            for path, tensor in reversed(before):
                if total.shape == added.shape == tensor.shape and _equal(tensor, total - added, total):
                    return path, 0
        return None

    @torch.no_grad()
    def residual(self, layer: str) -> tuple[Residual | None, str | None]:
        """(the residual stream to which the layer's output is added, the parameter that scales the output first)."""
        if layer not in self.outputs or layer in self.repeated:
            return None, None
        block = self.block_of[layer]
        at, output = self.outputs[layer]
        _, result = self.results.get(block, (0, None))
        sums = [tensor for _, tensor in self.events[at : at + NEAR]] + ([] if result is None else [result])
        before = [one for one in self.events[max(0, at - NEAR) : at] if self._is_usable(one[0], block)]
        scaled = [(None, output), *self._scaled(layer, block, output)]
        for total in sums:
            if total.shape != output.shape:
                continue
            for name, added in scaled:
                wanted = total - added
                for path, tensor in reversed(before):
                    if tensor.shape == output.shape and _equal(tensor, wanted, total):
                        return (path, 0), name
        return None, None

    def _is_usable(self, path: str, block: str) -> bool:
        """Whether a module can be observed while its layer's block is computed and earlier blocks are replayed."""
        others = (one for one in set(self.block_of.values()) if one != block)
        return path not in self.repeated and not any(path == one or path.startswith(f"{one}.") for one in others)

    def _scaled(self, layer: str, block: str, output: torch.Tensor) -> list[tuple[str | None, torch.Tensor]]:
        """(path, the layer's output after it) for a batch norm that reads the output, and for every parameter of the
        block that may be a layer scale."""
        found: list[tuple[str | None, torch.Tensor]] = []
        at = self.outputs[layer][0]
        for path, tensor in self.events[at : at + 2]:
            module = self.model.get_submodule(path)
            if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d) and torch.equal(tensor, output):
                found.append((path, module(output)))
        if _is_conv(self.model, layer):
            return found
        for name, parameter in self.model.get_submodule(block).named_parameters():
            if parameter.shape == output.shape[-1:] and not name.endswith(("bias", "norm.weight")):
                found.append((f"{block}.{name}", output * parameter.detach()))
        return found

    def is_channels_first(self, block: str) -> bool:
        """Whether the block's output is [batch, features, positions, ...]."""
        if block not in self.results:
            return False
        shape = self.results[block][1].shape
        features = {self.outputs[layer][1].shape[1 if _is_conv(self.model, layer) else -1]
                    for layer, one in self.block_of.items() if one == block and layer in self.outputs}  # fmt: skip
        layers = [layer for layer, one in self.block_of.items() if one == block]
        if len(shape) not in (3, 4):
            return False
        if shape[1] in features and shape[-1] not in features:
            return True
        return any(_is_conv(self.model, layer) for layer in layers) and shape[1] in features


def observe_streams(model: nn.Module, inputs: Mapping[str, torch.Tensor], block_of: Mapping[str, str]) -> Streams:
    """Run the model once and record what the modules inside these layers' blocks read. block_of: layer -> its block."""
    found = Streams(model, block_of)
    blocks = set(block_of.values())
    watched = [path for path, module in model.named_modules() if path and not isinstance(module, nn.ModuleList)]

    def before(path: str, args: tuple[Any, ...], kwargs: Any) -> None:
        if args and isinstance(args[0], torch.Tensor) and args[0].is_floating_point():
            if any(path == known for known, _ in found.events):
                found.repeated.add(path)
            found.events.append((path, args[0].detach().clone()))

    def after(path: str, args: Any, output: Any) -> None:
        tensor = next(tensors_in(output), None)
        if tensor is None:
            return
        if path in block_of:
            if path in found.outputs:
                found.repeated.add(path)
            found.outputs[path] = len(found.events), tensor.detach().clone()
        if path in blocks:
            found.results[path] = len(found.events), tensor.detach().clone()

    observed = [path for path in watched if path in blocks or path in block_of]
    with capture(model, dict.fromkeys(watched, before), dict.fromkeys(observed, after)), torch.no_grad():
        model(**inputs)
    return found


def _equal(one: torch.Tensor, other: torch.Tensor, scale: torch.Tensor) -> bool:
    limit = TOLERANCE * float(scale.abs().max())
    if float((one.flatten()[:FEW] - other.flatten()[:FEW]).abs().max()) > limit:
        return False
    return float((one - other).abs().max()) <= limit


def _is_conv(model: nn.Module, path: str) -> bool:
    return isinstance(model.get_submodule(path), Convolution)
