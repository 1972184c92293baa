"""Residual convolutional networks: the inner channels of basic and bottleneck blocks (torchvision, timm, CIFAR)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from torch import nn

from optin_export.errors import InputError
from optin_export.units.declare import Family, Producer, UnitGroup

_NAMES = ("BasicBlock", "Bottleneck")


def _is_block(module: nn.Module) -> bool:
    """Whether a module is a block, by name and parts: each library and user file has its own class of this form."""
    layers = [getattr(module, name, None) for name in ("conv1", "conv2")]
    norms = [getattr(module, name, None) for name in ("bn1", "bn2")]
    return (
        type(module).__name__ in _NAMES
        and all(isinstance(layer, nn.Conv2d) for layer in layers)
        and all(isinstance(norm, nn.BatchNorm2d) for norm in norms)
    )


def _groups(block: Any, path: str, index: int) -> tuple[UnitGroup, ...]:
    if _computes(getattr(block, "aa", None)):
        raise InputError(
            f"'{path}' is a variant of residual block that the family resnet cannot prune",
            f"'{path}.aa' ({type(block.aa).__name__}) is between its convolutions",
            "use a plain ResNet",
        )
    names = [name for name, _ in block.named_children()]
    if names.index("bn1") < names.index("conv1"):
        raise InputError(
            f"'{path}' is a variant of residual block that the family resnet cannot prune",
            "its norms come before its convolutions, not after them",
            "use a plain ResNet",
        )
    depth = 3 if isinstance(getattr(block, "conv3", None), nn.Conv2d) else 2
    convolutions = [getattr(block, f"conv{number}") for number in range(1, depth + 1)]
    groups = []
    # timm's gate (squeeze-and-excitation) comes after the last norm: its output has no fixed factor.
    is_gated = _computes(getattr(block, "se", None))
    for number in range(1, depth):
        producer, consumer = convolutions[number - 1], convolutions[number]
        if producer.groups != 1:
            continue  # its channels are cut with those of the previous layer
        last = number + 1 == depth
        if consumer.groups != 1:
            if not last and consumer.in_channels == consumer.out_channels == producer.out_channels:
                groups.append(_filtered(block, path, index, convolutions, is_gated))
            continue
        groups.append(
            UnitGroup(
                block=index,
                kind="channels",
                part="" if number == 1 else str(number),
                count=producer.out_channels,
                width=1,
                producers=(Producer(f"{path}.conv{number}", norm=f"{path}.bn{number}"),),
                consumer=f"{path}.conv{number + 1}",
                residual=_shortcut(block, path, convolutions) if last and not is_gated else None,
                scale=f"{path}.bn{number + 1}" if last and not is_gated else None,
                sublayer=None,
            )
        )
    return tuple(groups)


def _filtered(block: Any, path: str, index: int, layers: list[nn.Conv2d], is_gated: bool) -> UnitGroup:
    """ResNeXt: whole groups of a grouped convolution can be removed, but not single channels."""
    count = layers[1].groups
    width = layers[1].out_channels // count
    return UnitGroup(
        block=index,
        kind="channels",
        count=count,
        width=width,
        producers=tuple(Producer(f"{path}.conv{number}", norm=f"{path}.bn{number}", rows=width) for number in (1, 2)),
        consumer=f"{path}.conv3",
        residual=None if is_gated else _shortcut(block, path, layers),
        scale=None if is_gated else f"{path}.bn3",
        sublayer=None,
    )


def _shortcut(block: Any, path: str, layers: list[nn.Conv2d]) -> tuple[str, int | Literal["output"]] | None:
    """Where to observe the other side of the sum: the output of the projection, or else the input.

    None if that has another shape: then the projection is not a module with a known name, and the repair ignores it.
    """
    for name in ("downsample", "shortcut"):
        if getattr(block, name, None) is not None and not _is_empty(getattr(block, name)):
            return f"{path}.{name}", "output"
    same = layers[0].in_channels == layers[-1].out_channels and all(layer.stride == (1, 1) for layer in layers)
    return (f"{path}.conv1", 0) if same else None


def _is_empty(module: nn.Module) -> bool:
    return isinstance(module, nn.Identity) or (isinstance(module, nn.Sequential) and len(module) == 0)


def _computes(module: nn.Module | None) -> bool:
    return module is not None and not _is_empty(module)


@dataclass
class _Stream:
    """A residual stream: its writers and its readers, with the block of the first reader."""

    count: int
    producers: list[Producer]
    readers: list[tuple[int, str]] = field(default_factory=list)
    usable: bool = True


def _streams(model: nn.Module, blocks: Sequence[tuple[str, nn.Module]]) -> list[UnitGroup]:
    """The channels between blocks: one group from each change of width to the next."""
    first: Any = blocks[0][1]
    gate = next((path for path, block in blocks if _computes(getattr(block, "se", None))), None)
    if gate is not None:
        raise InputError(
            "the model has residual streams whose channels cannot be removed",
            f"'{gate}.se' gates the block's output to its stream",
            "set prune.coupled: false",
        )
    current = _stem(model, blocks[0][0], first.conv1.in_channels)
    streams = [current]
    for index, (path, block) in enumerate(blocks):
        layers = [getattr(block, f"conv{number}", None) for number in (1, 2, 3)]
        convolutions = [layer for layer in layers if isinstance(layer, nn.Conv2d)]
        last = Producer(f"{path}.conv{len(convolutions)}", norm=f"{path}.bn{len(convolutions)}")
        current.readers.append((index, f"{path}.conv1"))
        shortcut = next((name for name in ("downsample", "shortcut") if _computes(getattr(block, name, None))), None)
        if shortcut is None and _shortcut(block, path, convolutions) is not None:
            current.producers.append(last)
            continue
        projection = [] if shortcut is None else _projection(getattr(block, shortcut), f"{path}.{shortcut}")
        following = _Stream(convolutions[-1].out_channels, [*projection, last], usable=bool(projection))
        current.usable = current.usable and bool(projection)
        current.readers += [(index, one.path) for one in projection]
        current = following
        streams.append(current)
    heads = [path for path, module in model.named_modules() if isinstance(module, nn.Linear)]
    if heads and model.get_submodule(heads[-1]).in_features == current.count:
        current.readers.append((len(blocks) - 1, heads[-1]))
    else:
        current.usable = False  # the model outputs the stream itself
    return [_coupled(stream, number) for number, stream in enumerate(streams) if stream.usable]


def _stem(model: nn.Module, first_block: str, channels: int) -> _Stream:
    """The stream into the first block; its producer is the last convolution before it."""
    producer = None
    for path, module in model.named_modules():
        if path == first_block:
            break
        if isinstance(module, nn.Conv2d):
            producer = Producer(path) if module.out_channels == channels and module.groups == 1 else None
        elif isinstance(module, nn.BatchNorm2d) and producer is not None:
            producer = Producer(producer.path, norm=path) if module.num_features == channels else None
    return _Stream(channels, [] if producer is None else [producer], usable=producer is not None)


def _projection(shortcut: nn.Module, path: str) -> list[Producer]:
    """The convolution of a shortcut, with its norm; empty if the shortcut has anything else."""
    named = [(f"{path}.{name}" if name else path, module) for name, module in shortcut.named_modules()]
    layers = [name for name, module in named if isinstance(module, nn.Conv2d)]
    norms = [name for name, module in named if isinstance(module, nn.BatchNorm2d)]
    if len(layers) != 1 or len(norms) > 1:
        return []
    return [Producer(layers[0], norm=norms[0] if norms else None)]


def _coupled(stream: _Stream, number: int) -> UnitGroup:
    return UnitGroup(
        block=stream.readers[0][0],
        kind="channels",
        part=f".stream{number}",
        count=stream.count,
        width=1,
        producers=tuple(stream.producers),
        consumer=stream.readers[0][1],
        readers=tuple(path for _, path in stream.readers[1:]),
        residual=None,
        sublayer=None,
        coupled=True,
    )


FAMILY = Family(
    name="resnet",
    library="timm",
    examples="resnet*, wide_resnet*, resnext*, seresnet*, ResNets of CIFAR; also torchvision's",
    units=("channels",),
    parts=("conv1", "bn1", "conv2", "bn2"),
    is_block=_is_block,
    groups=_groups,
    channels_first=True,
    streams=_streams,
)
