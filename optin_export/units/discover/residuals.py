"""Find the residual streams next to layers: tensors h with h + f * (layer's output) = another tensor of the pass.

f is 1, or the factors of a layer scale or batch norm. h is the first argument of a module that runs before the layer,
or the output of a module with convolutions (the projection of a shortcut). The sum may be seen after a reshape, with
channels first, or in convolutional networks after a ReLU.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import nn

from optin_export.units.capture import capture
from optin_export.units.hooks import Convolution, channels_last
from optin_export.units.outputs import tensors_in

#: Relative difference up to which two tensors are the same.
TOLERANCE = 1e-5
#: Number of modules before and after a layer whose inputs are compared.
NEAR = 40
#: Entries that are compared first.
FEW = 64
Residual = tuple[str, int | Literal["output", "call"]]
Arrange = Callable[[nn.Module, Any], Any]


@dataclass
class Streams:
    """What modules read and returned in one pass, in running order.

    events: (module, its first argument as it began). outputs: layer -> its only output. results: block -> output.
    projected: (number of events before it, module with convolutions, output).
    """

    model: nn.Module
    block_of: Mapping[str, str]
    events: list[tuple[str, torch.Tensor]] = field(default_factory=list)
    outputs: dict[str, tuple[int, torch.Tensor]] = field(default_factory=dict)
    results: dict[str, tuple[int, torch.Tensor]] = field(default_factory=dict)
    projected: list[tuple[int, str, torch.Tensor]] = field(default_factory=list)
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
        before = [
            one for one in self.events[max(0, first - NEAR) : first] if self._is_usable(one[0], block) and one[1].any()
        ]
        for total in sums:
            for path, tensor in reversed(before):
                if total.shape == added.shape == tensor.shape and _equal(tensor, total - added, total):
                    return path, 0
        return None

    @torch.no_grad()
    def residual(self, layer: str) -> tuple[Residual | None, str | None, Arrange | None]:
        """(the residual stream to which the layer's output is added, what scales the output first, how the stream is
        arranged as the output; see `UnitGroup`)."""
        if layer not in self.outputs or layer in self.repeated:
            return None, None, None
        block, (at, output) = self.block_of[layer], self.outputs[layer]
        _, result = self.results.get(block, (0, None))
        sums = [tensor for _, tensor in self.events[at : at + NEAR]] + ([] if result is None else [result])
        scaled = [(None, output), *self._scaled(layer, block, output)]
        for arrange in (None, channels_last):
            streams = list(_arranged(self._streams_near(layer), output, arrange))
            if not streams:
                continue
            few = torch.stack([tensor.flatten()[:FEW] for _, tensor in streams])
            for total in (laid for one in sums if (laid := _as_output(one, output, arrange)) is not None):
                is_relu = _is_conv(self.model, layer) and float(total.min()) == 0 < float(total.max())
                for name, added in scaled:
                    number = _summand(few, [tensor for _, tensor in streams], added, total, is_relu)
                    if number is not None:
                        return streams[number][0], name, arrange
        return None, None, None

    def _streams_near(self, layer: str) -> Iterator[tuple[Residual, torch.Tensor]]:
        """First arguments seen before the layer, the latest first; then outputs of modules that do not contain it and
        read something from before it. None that is zero, which can be added to anything."""
        at, block = self.outputs[layer][0], self.block_of[layer]
        for path, tensor in reversed(self.events[max(0, at - NEAR) : at]):
            if self._is_usable(path, block) and tensor.any():
                yield (path, 0), tensor
        for number, path, tensor in reversed(self.projected):
            apart = abs(number - at) <= NEAR and not layer.startswith(f"{path}.")
            if apart and self._is_usable(path, block) and self._reads_before(path, at) and tensor.any():
                yield (path, "output"), tensor

    def _reads_before(self, path: str, at: int) -> bool:
        """Whether the module's first argument was seen before event `at`."""
        for number, (name, read) in enumerate(self.events):
            if name == path:
                earlier = self.events[max(0, at - NEAR) : at]
                return number < at or any(one.shape == read.shape and torch.equal(one, read) for _, one in earlier)
        return False

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
        is_conv = _is_conv(self.model, layer)
        features = output.shape[1 if is_conv else -1]
        for path, module in self.model.get_submodule(block).named_modules(prefix=block):
            if type(module).__module__.startswith("torch.nn."):
                continue  # weights of layers and norms
            for name, parameter in module.named_parameters(recurse=False):
                if parameter.numel() == features == max(parameter.shape) and name != "bias":
                    factors = parameter.detach().flatten()
                    by_feature = factors.view(1, -1, *[1] * (output.dim() - 2)) if is_conv else factors
                    found.append((f"{path}.{name}", output * by_feature))
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
        if path in convolutional:
            found.projected.append((len(found.events), path, tensor.detach().clone()))

    convolutional = {path for path in watched if _has_conv(model.get_submodule(path))} - block_of.keys()
    observed = [path for path in watched if path in blocks or path in block_of or path in convolutional]
    with capture(model, dict.fromkeys(watched, before), dict.fromkeys(observed, after)), torch.no_grad():
        model(**inputs)
    return found


def _arranged(
    streams: Iterable[tuple[Residual, torch.Tensor]], output: torch.Tensor, arrange: Arrange | None
) -> Iterator[tuple[Residual, torch.Tensor]]:
    """The streams that then have the output's shape."""
    for residual, tensor in streams:
        laid = tensor if arrange is None else arrange(nn.Identity(), tensor) if tensor.dim() == 4 else None
        if laid is not None and laid.shape == output.shape:
            yield residual, laid


def _as_output(total: torch.Tensor, output: torch.Tensor, arrange: Arrange | None) -> torch.Tensor | None:
    """A possible sum in the layout of the layer's output; None if it has another number of features."""
    if arrange is not None:
        total = arrange(nn.Identity(), total) if total.dim() == 4 else total
        return total if total.shape == output.shape else None
    if total.numel() == output.numel() and total.shape[-1] == output.shape[-1]:
        return total.reshape(output.shape)
    return None


def _summand(
    few: torch.Tensor, streams: Sequence[torch.Tensor], added: torch.Tensor, total: torch.Tensor, is_relu: bool
) -> int | None:
    """The number of the first stream with stream + added = total. few: the first entries of each stream."""
    limit = TOLERANCE * float(total.abs().max())
    first, some = total.flatten()[:FEW], added.flatten()[:FEW]
    near = (few - (first - some)).abs().amax(1) <= limit
    if is_relu:
        near |= ((few + some).relu() - first).abs().amax(1) <= limit
    for number in near.nonzero().flatten().tolist():
        left = streams[number] + added
        if float(((left.relu() if is_relu else left) - total).abs().max()) <= limit:
            return int(number)
    return None


def _equal(one: torch.Tensor, other: torch.Tensor, scale: torch.Tensor) -> bool:
    limit = TOLERANCE * float(scale.abs().max())
    if float((one.flatten()[:FEW] - other.flatten()[:FEW]).abs().max()) > limit:
        return False
    return float((one - other).abs().max()) <= limit


def _has_conv(module: nn.Module) -> bool:
    return any(isinstance(one, Convolution) for one in module.modules())


def _is_conv(model: nn.Module, path: str) -> bool:
    return isinstance(model.get_submodule(path), Convolution)
