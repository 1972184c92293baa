"""Residual convolutional networks: the inner channels of basic and bottleneck blocks (torchvision, timm, CIFAR)."""

from __future__ import annotations

from typing import Any, Literal

from torch import nn

from optin_export.errors import InputError
from optin_export.families._declare import Family, Producer, UnitGroup

_NAMES = ("BasicBlock", "Bottleneck")


def _is_block(module: nn.Module) -> bool:
    """By name and parts: every library, and every user's file, has its own class of the same form."""
    layers = [getattr(module, name, None) for name in ("conv1", "conv2")]
    norms = [getattr(module, name, None) for name in ("bn1", "bn2")]
    return (
        type(module).__name__ in _NAMES
        and all(isinstance(layer, nn.Conv2d) for layer in layers)
        and all(isinstance(norm, nn.BatchNorm2d) for norm in norms)
    )


def _groups(block: Any, path: str, index: int) -> tuple[UnitGroup, ...]:
    extra = next((name for name in ("se", "aa") if _computes(getattr(block, name, None))), None)
    if extra is not None:
        raise InputError(
            f"'{path}' is a variant of residual block that the family resnet cannot prune",
            f"'{path}.{extra}' ({type(getattr(block, extra)).__name__}) stands between its convolutions",
            "use a plain ResNet",
        )
    names = [name for name, _ in block.named_children()]
    if names.index("bn1") < names.index("conv1"):
        raise InputError(
            f"'{path}' is a variant of residual block that the family resnet cannot prune",
            "its norms stand before its convolutions, not behind them",
            "use a plain ResNet",
        )
    depth = 3 if isinstance(getattr(block, "conv3", None), nn.Conv2d) else 2
    convolutions = [getattr(block, f"conv{number}") for number in range(1, depth + 1)]
    groups = []
    for number in range(1, depth):
        producer, consumer = convolutions[number - 1], convolutions[number]
        if producer.groups != 1 or consumer.groups != 1:
            continue  # channels of a grouped convolution do not go one by one
        last = number + 1 == depth
        groups.append(
            UnitGroup(
                block=index,
                kind="channels",
                part="" if number == 1 else str(number),
                count=producer.out_channels,
                width=1,
                producers=(Producer(f"{path}.conv{number}", norm=f"{path}.bn{number}"),),
                consumer=f"{path}.conv{number + 1}",
                residual=_shortcut(block, path, convolutions) if last else None,
                scale=f"{path}.bn{number + 1}" if last else None,
                sublayer=None,
            )
        )
    return tuple(groups)


def _shortcut(block: Any, path: str, layers: list[nn.Conv2d]) -> tuple[str, int | Literal["output"]] | None:
    """Where the sum's other side is seen: what comes out of the projection, or else what comes in.

    None if that has another shape: the projection then is no module of a known name, and the repair does without it.
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


FAMILY = Family(
    name="resnet",
    library="timm",
    examples="resnet*, wide_resnet*, ResNets of CIFAR; also torchvision's",
    units=("channels",),
    is_block=_is_block,
    groups=_groups,
    channels_first=True,
)
