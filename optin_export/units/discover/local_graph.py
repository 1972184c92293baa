"""One forward pass whose autograd graph is cut at every linear layer and convolution.

The output of each such layer becomes a leaf, so that a gradient from the input of a layer reaches exactly the layers
that feed it, through whatever lies between: activations, norms, gates, reshapes, attention.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from optin_export.units.capture import capture, reset_caches
from optin_export.units.outputs import map_tensors, tensors_in

#: Name of the model's output among the readers.
OUTPUT = ""
_CONVOLUTIONS = nn.Conv1d | nn.Conv2d | nn.Conv3d
_TRANSPOSED = nn.ConvTranspose1d | nn.ConvTranspose2d | nn.ConvTranspose3d
_NORMS = nn.BatchNorm1d | nn.BatchNorm2d | nn.BatchNorm3d
#: Activations without gradient on a part of their inputs.
_INACTIVE = {
    *(F.relu, F.relu_, F.relu6, F.hardtanh, F.hardtanh_, F.hardswish, F.hardsigmoid, F.threshold),
    *(torch.relu, torch.relu_, torch.threshold, torch.threshold_, torch.Tensor.relu, torch.Tensor.relu_),
}


def mixes(module: nn.Module) -> bool:
    """Whether every output feature of the module depends on every input feature."""
    if isinstance(module, _CONVOLUTIONS):
        return module.groups == 1
    return isinstance(module, nn.Linear | nn.Bilinear | _TRANSPOSED | nn.Embedding | nn.EmbeddingBag | nn.RNNBase)


def is_grouped(module: nn.Module) -> bool:
    """Whether the module is a convolution of which each group of features reads only one group of inputs."""
    return isinstance(module, _CONVOLUTIONS) and module.groups > 1


def feature_dim(module: nn.Module, tensor: torch.Tensor) -> int:
    """The dimension of a layer's input or output that counts features."""
    if isinstance(module, _CONVOLUTIONS | _TRANSPOSED):
        spatial = {nn.Conv1d: 1, nn.ConvTranspose1d: 1, nn.Conv3d: 3, nn.ConvTranspose3d: 3}
        return tensor.dim() - 1 - next((dims for kind, dims in spatial.items() if isinstance(module, kind)), 2)
    if isinstance(module, _NORMS):
        return 1 if tensor.dim() > 1 else 0
    return tensor.dim() - 1


class _Active(TorchFunctionMode):
    """Computes softplus for such activations, so that every feature has a gradient."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function in _INACTIVE:
            return F.softplus(args[0] if args else kwargs["input"])
        return function(*args, **(kwargs or {}))


@dataclass
class LocalGraph:
    """What one pass computed. Paths are in the order of first calls.

    reads: layer path -> its inputs, call by call. makes: layer path -> its outputs, call by call; leaves for layers,
    nodes for norms. parameters: name -> parameter (none of them belongs to a leaf's own computation).
    order: path -> number of its first call.
    """

    model: nn.Module
    reads: dict[str, list[torch.Tensor]] = field(default_factory=dict)
    makes: dict[str, list[torch.Tensor]] = field(default_factory=dict)
    parameters: dict[str, nn.Parameter] = field(default_factory=dict)
    order: dict[str, int] = field(default_factory=dict)

    def module(self, path: str) -> nn.Module:
        return self.model.get_submodule(path)


@contextlib.contextmanager
def local_graph(model: nn.Module, inputs: Mapping[str, torch.Tensor]) -> Iterator[LocalGraph]:
    """Run the model once; its weights keep their values and are marked as they were at the end.

    Leaves hold noise of the size of the layers' outputs, and no activation is inactive, so that no gradient is zero by
    chance.
    """
    graph, generator = LocalGraph(model), torch.Generator().manual_seed(0)
    modules = dict(model.named_modules())
    cut = [path for path, module in modules.items() if mixes(module) or is_grouped(module)]
    watched = [path for path, module in modules.items() if isinstance(module, _NORMS)]
    readers = [path for path in cut if not isinstance(modules[path], nn.Embedding | nn.EmbeddingBag)]

    def before(path: str, args: tuple[Any, ...], kwargs: Any) -> None:
        graph.order.setdefault(path, len(graph.order))
        if args and isinstance(args[0], torch.Tensor) and args[0].is_floating_point():
            # A copy in the graph: the model may overwrite the tensor later.
            graph.reads.setdefault(path, []).append(args[0].clone())

    def leaf(path: str, args: Any, output: Any) -> Any:
        graph.order.setdefault(path, len(graph.order))

        def cut_off(_: int, tensor: torch.Tensor) -> torch.Tensor:
            if not tensor.is_floating_point():
                return tensor
            own = tensor.detach()
            scale = own.abs().mean().clamp(min=1e-3).cpu()
            noise = torch.randn(own.shape, generator=generator) * scale
            own = noise.to(own).requires_grad_()
            graph.makes.setdefault(path, []).append(own)
            return own.clone()

        return map_tensors(output, cut_off)

    def node(path: str, args: Any, output: Any) -> Any:
        if not isinstance(output, torch.Tensor) or not output.requires_grad:
            return None
        graph.order.setdefault(path, len(graph.order))
        graph.makes.setdefault(path, []).append(own := output.clone())
        return own.clone()

    reset_caches(model)
    frozen = {name: one.requires_grad for name, one in model.named_parameters()}
    try:
        for one in model.parameters():
            one.requires_grad_(one.is_floating_point())
        with (
            torch.enable_grad(),
            _Active(),
            capture(
                model, dict.fromkeys(readers, before), {**dict.fromkeys(cut, leaf), **dict.fromkeys(watched, node)}
            ),
        ):
            result = model(**inputs)
        graph.reads[OUTPUT] = [one for one in tensors_in(result) if one.is_floating_point()]
        graph.order[OUTPUT] = len(graph.order)
        graph.parameters = dict(model.named_parameters())
        yield graph
    finally:
        for name, one in model.named_parameters():
            one.requires_grad_(frozen[name])
        graph.reads.clear()
        graph.makes.clear()
        reset_caches(model)
        with torch.no_grad():
            model(**inputs)  # values that modules keep from a pass must not hold its graph
