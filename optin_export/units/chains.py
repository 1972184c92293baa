"""Channels between plain convolutions outside known blocks: necks, pyramids and heads of segmentation models.

They are found in autograd's graph of one forward pass, not by names. The channels that a convolution makes are units if
no operation between it and the convolutions that read them mixes channels, and nothing else reads them.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from optin_export.units.declare import Producer, UnitGroup
from optin_export.units.trace import Node, Pass

#: The name of such units in the report, next to the names of families.
NAME = "convolutions"
_CONVOLUTION, _WEIGHT = "ConvolutionBackward0", 1
_NORMS = ("NativeBatchNormBackward0", "CudnnBatchNormBackward0", "MiopenBatchNormBackward0")
#: Functions of one tensor whose output channel c depends only on input channel c, and that keep the dimensions.
_PER_CHANNEL = (
    *("Relu", "LeakyRelu", "Hardtanh", "Hardswish", "Hardsigmoid", "Sigmoid", "Silu", "Gelu", "Elu", "Mish", "Tanh"),
    *("MaxPool2DWithIndices", "AvgPool2D", "AdaptiveAvgPool2D", "AdaptiveMaxPool2D", "ConstantPadNd"),
    *("UpsampleBilinear2D", "UpsampleNearest2D", "UpsampleBicubic2D", "NativeDropout", "Clone"),
)
_KEEPS = {f"{name}Backward{version}" for name in _PER_CHANNEL for version in (0, 1)}


@dataclass
class _Walk:
    """The layers on the path of one convolution's channels: further producers, and the layers that read them."""

    producers: list[Producer]
    readers: list[str] = field(default_factory=list)


def conv_chains(model: nn.Module, seen: Pass, taken: Collection[str]) -> Iterator[UnitGroup]:
    """Groups of channels, each with block 0: the caller knows the block of its consumer. taken: layers and blocks whose
    units are already declared; they are skipped with all that is inside them."""
    taken = set(taken)
    layers = _Layers(model, seen, taken)
    for path, layer in layers.paths.items():
        if layer.groups != 1:
            continue
        walk = layers.walk(path)
        if walk is None:
            continue
        # The last reader is the consumer, because all others have run by then.
        *readers, consumer = sorted(set(walk.readers), key=lambda name: seen.order[id(layers.paths[name])])
        yield UnitGroup(
            block=0,
            kind="channels",
            count=layer.out_channels,
            width=1,
            producers=tuple(walk.producers),
            consumer=consumer,
            readers=tuple(readers),
            residual=None,
            sublayer=None,
        )


class _Layers:
    """Convolutions and batch norms that run once and are not taken, and the nodes of what they compute."""

    def __init__(self, model: nn.Module, seen: Pass, taken: set[str]) -> None:
        self.seen = seen
        self.paths: dict[str, nn.Conv2d] = {}
        self.at: dict[Node, str] = {}
        self.norms: dict[Node, tuple[str, int]] = {}
        for path, module in model.named_modules():
            node = seen.outputs.get(id(module))
            if node is None or seen.calls.get(id(module)) != 1 or _inside(path, taken):
                continue
            if isinstance(module, nn.Conv2d) and _is_plain(module, node):
                self.paths[path] = module
                self.at[node] = path
            elif isinstance(module, nn.BatchNorm2d) and module.running_mean is not None:
                norm = _norm_of(node)
                if norm is not None:
                    self.norms[norm] = path, module.num_features

    def walk(self, path: str) -> _Walk | None:
        """Follow the channels; None if an operation mixes them, or reads them in another way than a convolution."""
        layer = self.paths[path]
        found = _Walk([])
        todo = [(path, self.seen.outputs[id(layer)])]
        while todo:
            name, start = todo.pop()
            norms: list[str] = []
            nodes, known = [start], {start}
            while nodes:
                node = nodes.pop()
                if node is self.seen.last:
                    return None  # the model's output
                for user, argument in self.seen.users.get(node, ()):
                    if user in known:
                        continue
                    if user.name() == _CONVOLUTION:
                        following = self.at.get(user)
                        if following is None or argument != 0:
                            return None
                        reader = self.paths[following]
                        if reader.in_channels != layer.out_channels:
                            return None
                        if reader.groups == 1:
                            found.readers.append(following)
                        elif reader.groups == reader.in_channels == reader.out_channels:
                            todo.append((following, user))
                        else:
                            return None
                        continue
                    if user.name() in _NORMS:
                        # A norm after a fork, or a second norm, would have to be cut as well, but only a norm that
                        # directly follows the producer is.
                        norm, features = self.norms.get(user, ("", 0))
                        if node is not start or features != layer.out_channels or len(self.seen.users[start]) > 1:
                            return None
                        norms.append(norm)
                    elif not _keeps_channels(user):
                        return None
                    known.add(user)
                    nodes.append(user)
            # One output row per unit, set explicitly: it is cut there, not where a tracer would infer it.
            found.producers.append(Producer(name, norm=norms[0] if norms else None, rows=1))
        return found if found.readers else None


def _is_plain(layer: nn.Conv2d, node: Node) -> bool:
    """Whether the layer computes only a convolution with its unmodified weight."""
    if node.name() != _CONVOLUTION:
        return False
    weight: Any = node.next_functions[_WEIGHT][0]
    return getattr(weight, "variable", None) is layer.weight


def _keeps_channels(node: Node) -> bool:
    if node.name() == "MeanBackward1":  # global average pooling of [batch, channels, height, width]
        dims = {dim - (1 << 64) if dim > 1 << 63 else dim for dim in node._saved_dim}
        return bool(node._saved_keepdim) and dims <= {2, 3, -1, -2}
    return node.name() in _KEEPS


def _norm_of(node: Node) -> Node | None:
    """The batch norm's own node; classes that include an activation return the node after it."""
    for _ in range(3):
        if node is None or node.name() in _NORMS:
            return node
        if not _keeps_channels(node):
            return None
        node = node.next_functions[0][0]
    return None


def _inside(path: str, taken: set[str]) -> bool:
    parts = path.split(".")
    return any(".".join(parts[:end]) in taken for end in range(1, len(parts) + 1))
