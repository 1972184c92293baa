"""VGG: a chain of convolutions and fully connected layers without residual streams (torchvision)."""

from __future__ import annotations

import itertools
from typing import Any

from torch import nn

from optin_export.errors import InputError
from optin_export.units.declare import Family, Producer, UnitGroup


def _is_chain(module: nn.Module) -> bool:
    parts = (getattr(module, name, None) for name in ("features", "classifier"))
    return type(module).__name__ == "VGG" and all(isinstance(part, nn.Sequential | nn.Linear) for part in parts)


def _chain(module: Any, path: str) -> tuple[list[str], list[UnitGroup]]:
    """A block is a layer with the modules that follow it; a layer's units belong to the block of their reader."""
    where = f"{path}." if path else ""
    parts = [(f"{where}{name}", part) for name, part in module.named_modules() if not list(part.children())]
    layers = [index for index, (_, part) in enumerate(parts) if isinstance(part, nn.Conv2d | nn.Linear)]
    ends = [next(_activations(parts, start), start) for start in layers]
    groups = []
    for block, (start, following) in enumerate(itertools.pairwise(layers), start=1):
        (path, producer), (consumer_path, consumer) = parts[start], parts[following]
        between = parts[start + 1 : following]
        norm = next((name for name, part in between if isinstance(part, nn.BatchNorm2d)), None)
        count = producer.weight.shape[0]
        if consumer.weight.shape[1] % count or getattr(consumer, "groups", 1) != 1:
            raise InputError(
                f"'{consumer_path}' does not read the output of '{path}'",
                "the family vgg supports plain chains of layers only",
                "use a plain VGG",
            )
        groups.append(
            UnitGroup(
                block=block,
                kind="channels" if isinstance(producer, nn.Conv2d) else "neurons",
                count=count,
                width=consumer.weight.shape[1] // count,  # after flattening, the positions of one channel are adjacent
                producers=(Producer(path, norm=norm),),
                consumer=consumer_path,
                residual=None,
                sublayer=None,
            )
        )
    return [parts[end][0] for end in ends], groups


def _activations(parts: list[tuple[str, nn.Module]], start: int) -> Any:
    """Index of the activation after layer `start`, if one comes before the next layer."""
    for index in range(start + 1, len(parts)):
        if isinstance(parts[index][1], nn.Conv2d | nn.Linear):
            return
        if isinstance(parts[index][1], nn.ReLU):
            yield index


FAMILY = Family(
    name="vgg",
    library="torchvision",
    examples="VGG-11 to VGG-19, with and without batch norm",
    units=("channels", "neurons"),
    parts=("features.0", "features.1", "classifier"),
    is_block=_is_chain,
    channels_first=True,
    chain=_chain,
)
