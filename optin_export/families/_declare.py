"""What a family file declares: where the units of one block are. Pure data over module paths."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Literal

from torch import nn

UnitKind = Literal["heads", "neurons"]


@dataclass(frozen=True)
class Producer:
    """A Linear whose output rows are the units' features; `fused` slabs of rows lie one after another (3 for qkv)."""

    path: str
    fused: int = 1


@dataclass(frozen=True)
class UnitGroup:
    """All units of one kind in one block. They are consecutive slices of the consumer's input features.

    Setting a unit's slice of the consumer's input to zero is exactly the removal of the unit; this is what masks,
    scores and the dense rebuild have in common. Paths are relative to the task module.

    count: number of units. width: consumer input features per unit (head dim for heads, 1 for neurons).
    residual: the module, and the index of its positional argument, where the residual stream beside the sub-layer is
        seen. scale: module with a `gamma` that multiplies the sub-layer's output (layer scale), if any.
    sizes: attributes that hold a size, with their value per unit, e.g. ("blocks.0.attn.num_heads", 1).
    sublayer: replaced by a constant when no unit is kept; `returns_tuple` if its caller unpacks (output, weights).
    bypass: modules that are then not needed either and pass their first argument on.
    """

    block: int
    kind: UnitKind
    count: int
    width: int
    producers: tuple[Producer, ...]
    consumer: str
    residual: tuple[str, int]
    sublayer: str
    scale: str | None = None
    sizes: tuple[tuple[str, int], ...] = ()
    returns_tuple: bool = False
    bypass: tuple[tuple[str, bool], ...] = ()

    @property
    def key(self) -> str:
        return f"block{self.block:02d}.{self.kind}"


@dataclass(frozen=True)
class Structure:
    """A module as its family sees it: block paths and unit groups, both in forward order.

    Each block's input depends on the model's inputs and on the output of the block before it, on nothing else.
    """

    family: str
    blocks: tuple[str, ...]
    groups: tuple[UnitGroup, ...]

    def only(self, kinds: Iterable[str]) -> Structure:
        """The same structure with only these kinds of units free to be removed."""
        return Structure(self.family, self.blocks, tuple(group for group in self.groups if group.kind in set(kinds)))


@dataclass(frozen=True)
class Family:
    """An architecture: which modules are its blocks, and where the units of one block are.

    examples: models of this family, as users know them. is_block: whether a module is a block of this family.
    groups: (block module, its path, its index) -> its unit groups, in forward order. Raises InputError for a variant
    that this family cannot prune.
    """

    name: str
    library: Literal["transformers", "timm"]
    examples: str
    units: tuple[UnitKind, ...]
    is_block: Callable[[nn.Module], bool]
    groups: Callable[[Any, str, int], tuple[UnitGroup, ...]]


def class_named(*names: str) -> Callable[[nn.Module], bool]:
    """By class name rather than by class: the library is not imported to find out that it is not in use."""
    return lambda module: type(module).__name__ in names
