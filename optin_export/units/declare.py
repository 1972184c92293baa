"""The declarations of a family file: where the units of one block are. Only data on module paths."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any, Literal

from torch import nn

from optin_export.errors import InputError
from optin_export.units.execution_order import Walk
from optin_export.units.query_keys import DIMENSIONS, QueryKeys

UnitKind = Literal["heads", "neurons", "channels", "dimensions"]


@dataclass(frozen=True)
class Producer:
    """A Linear, Conv1d or Conv2d whose output rows are the units' features.

    fused: slabs of rows that lie one after another (3 for qkv). norm: a batch norm between it and the consumer, if any.
    rows: output features per unit in one slab, where that is not `UnitGroup.rows` (grouped-query attention: a unit is
    a key and value head with the query heads that share it). index: the output rows of each unit, where they are not
    such slabs; rows of no unit stay. keeps_inputs: it is a grouped convolution whose inputs are no units, so they all
    stay, and its groups may have different numbers of rows.
    """

    path: str
    fused: int = 1
    norm: str | None = None
    rows: int | None = None
    index: tuple[tuple[int, ...], ...] | None = None
    keeps_inputs: bool = False


@dataclass(frozen=True)
class Table:
    """A parameter or buffer with entries per unit outside the layers: a relative position table, or a bias.

    dim: the dimension that counts units. entries: how many entries along it a unit has. index: the entries of each
    unit, where they are not consecutive.
    """

    path: str
    dim: int = 0
    entries: int = 1
    index: tuple[tuple[int, ...], ...] | None = None


@dataclass(frozen=True)
class UnitGroup:
    """Units of one kind in one block. They are consecutive slices of the input features of one Linear, Conv1d or
    Conv2d, or the features that `columns` names.

    Setting a unit's slice of the consumer's input to zero is exactly the removal of the unit; this is what masks,
    scores and the dense rebuild have in common. Paths are relative to the task module.

    block: the block of the consumer. count: number of units. width: consumer input features per unit (head
        dim for heads, 1 for neurons and channels).
    residual: the module, and the index of its positional argument (or "output"), where the residual stream of the
        sub-layer is seen; None if nothing is added to the consumer's output. "call": all that the module is called
        with, as (positional, named) arguments, for `arrange` to make the stream from.
    added: layers that ran before and whose outputs are added to that stream as well (parallel sub-layers).
    scale: the operation between the consumer and that sum: layer scale (its parameter, or a module with a `gamma`) or a
        batch norm, if any.
    sizes: attributes that hold a size, with their value per unit, e.g. ("blocks.0.attn.num_heads", 1).
    sublayer: replaced by a constant when no unit is kept; `returns_tuple` if its caller unpacks (output, weights);
        None if at least one unit has to stay.
    bypass: modules that are then not needed either and pass their first argument on.
    part: distinguishes several groups of one kind in one block.
    readers: further layers that read the same units; all must, for the removal to be exact.
    tables: other parameters and buffers with entries per unit.
    arrange: (task module, tensor of the residual stream) -> the tensor with its rows as the consumer's output has
        them, where that differs: windows, channels last. It only moves entries (and may add zeros).
    expands: the sub-layer's caller reshapes its output, so the constant in its place has the shape of the input.
    pairwise: heads that multiply every query with every key; not those that sample (deformable attention).
    batch_dim: the dimension of the consumer's input that counts samples.
    coupled: the units are channels of a residual stream: every layer that writes to it is a producer, and every layer
        that reads it the consumer or a reader. They are removed from all of them together.
    found: the units were found by measurement (`discover`), not declared by a family. They are cut by their rows, and
        verified on the model before use.
    selects: (module, its arguments) for tensors with all heads of the unpruned model, [batch, heads, ...] or [batch *
        heads, ...], of which the module is to take the heads that stay (see `selected_heads`).
    outside: MACs per sample and unit outside the group's layers (attention), as measured on the rebuilt model; None:
        computed from `pairwise`.
    columns: (reader, the input features of each unit), for readers whose input holds other features as well (of
        several layers, concatenated), or the units in another order or width.
    """

    block: int
    kind: UnitKind
    count: int
    width: int
    producers: tuple[Producer, ...]
    consumer: str
    residual: tuple[str, int | Literal["output", "call"]] | None
    sublayer: str | None
    scale: str | None = None
    added: tuple[str, ...] = ()
    sizes: tuple[tuple[str, int], ...] = ()
    returns_tuple: bool = False
    bypass: tuple[tuple[str, bool], ...] = ()
    part: str = ""
    readers: tuple[str, ...] = ()
    tables: tuple[Table, ...] = ()
    arrange: Callable[[nn.Module, Any], Any] | None = None
    expands: bool = False
    pairwise: bool = True
    batch_dim: int = 0
    coupled: bool = False
    found: bool = False
    selects: tuple[str, tuple[str, ...]] | None = None
    outside: int | None = None
    columns: tuple[tuple[str, tuple[tuple[int, ...], ...]], ...] = ()

    @property
    def reads(self) -> tuple[str, ...]:
        """Every layer that reads the units."""
        return (self.consumer, *self.readers)

    @property
    def key(self) -> str:
        return f"block{self.block:02d}.{self.kind}{self.part}"

    @property
    def rows(self) -> int:
        """Output features per unit in one slab of a producer: a head's dimensions; one for a neuron or a channel.

        A channel may be several input features of its consumer (`width`): its positions, after flattening.
        """
        return self.width if self.kind == "heads" else 1

    def rows_in(self, producer: Producer) -> int:
        """Output features per unit in one slab of this producer."""
        if producer.index is not None:
            return len(producer.index[0])
        return self.rows if producer.rows is None else producer.rows

    def rows_of(self, producer: Producer, units: Iterable[int]) -> list[int]:
        """The output rows of a producer that belong to these units, in ascending order for ascending units."""
        if producer.index is not None:
            return sorted(row for unit in units for row in producer.index[unit])
        size, wanted = self.rows_in(producer), list(units)
        span = self.count * size
        return [
            slab * span + unit * size + row for slab in range(producer.fused) for unit in wanted for row in range(size)
        ]

    def width_in(self, path: str) -> int:
        """Input features per unit of this reader."""
        index = self.features_in(path)
        return self.width if index is None else len(index[0])

    def features_in(self, path: str) -> tuple[tuple[int, ...], ...] | None:
        """The entry of `columns` for this reader."""
        return next((index for reader, index in self.columns if reader == path), None)

    def columns_of(self, path: str, units: Iterable[int]) -> list[int]:
        """The input features of a reader that belong to these units, unit by unit."""
        index = self.features_in(path)
        if index is not None:
            return [feature for unit in units for feature in index[unit]]
        return [unit * self.width + offset for unit in units for offset in range(self.width)]

    def entries_of(self, table: Table, units: Iterable[int]) -> list[int]:
        """The entries of a table along its dimension that belong to these units."""
        if table.index is not None:
            return sorted(entry for unit in units for entry in table.index[unit])
        return [unit * table.entries + entry for unit in units for entry in range(table.entries)]

    def step(self, align: int) -> int:
        """Step in units that keeps layer sizes multiples of `align`; 1 for heads. Of dimensions, a quarter at most."""
        if self.kind == DIMENSIONS:
            return math.gcd(align, 1 << (self.count // 4).bit_length() - 1) if self.count >= 4 else 1
        return 1 if self.kind == "heads" else align // math.gcd(align, self.rows_in(self.producers[0]))


@dataclass(frozen=True)
class Refusal:
    """Units of one kind that exist but cannot be removed one by one: the error for recipes that ask for them."""

    kind: UnitKind
    error: InputError


@dataclass(frozen=True)
class Structure:
    """A module as its families see it: block paths and unit groups.

    family: the name of the family, or of several, joined by " + " ("resnet + vit").
    channels_first: the blocks whose output, if it has four dimensions, is [batch, features, height, width] rather than
    [..., features]. families: the family of each block, if there are several. refused: units that cannot be
    removed, with the reason.
    attentions: those whose queries and keys may have fewer dimensions (see `find_query_keys`), if they may in this run.
    walk: the order of the blocks and the readers of their outputs, as measured (`families.measured`); None before
    that: they are then taken to run once each, in this order, each read by the next alone.
    """

    family: str
    blocks: tuple[str, ...]
    groups: tuple[UnitGroup, ...]
    channels_first: frozenset[str] = frozenset()
    families: tuple[str, ...] = ()
    refused: tuple[Refusal, ...] = ()
    walk: Walk | None = None
    attentions: tuple[QueryKeys, ...] = ()

    @property
    def order(self) -> tuple[int, ...]:
        """Indices of the blocks in the order in which they run, without blocks that never run."""
        return tuple(range(len(self.blocks))) if self.walk is None else self.walk.order

    @property
    def observed(self) -> tuple[str, ...]:
        """Paths of the blocks whose outputs can be seen, in the order in which they run."""
        silent = () if self.walk is None else self.walk.silent
        return tuple(self.blocks[index] for index in self.order if self.blocks[index] not in silent)

    @property
    def rewritten(self) -> frozenset[str]:
        """Modules whose output is overwritten in place later in the pass: stored values must be copies."""
        return frozenset() if self.walk is None else self.walk.rewritten

    @property
    def searched_groups(self) -> tuple[UnitGroup, ...]:
        """What the search shares the budget among: the groups of units, and one group for each of `attentions`.

        The units of the latter are dimensions; removing them changes the layer of the queries alone.
        """
        batch_dims = {group.key: group.batch_dim for group in self.groups}
        return self.groups + tuple(
            UnitGroup(
                one.block, DIMENSIONS, one.count, 1, (), one.query, None, None, batch_dim=batch_dims.get(one.heads, 0)
            )
            for one in self.attentions
        )

    def gradients(self) -> AbstractContextManager[Any]:
        """A context for a forward pass and its backward passes (see `Walk.gradients`)."""
        return contextlib.nullcontext() if self.walk is None else self.walk.gradients()

    def before(self, group: UnitGroup) -> tuple[str, ...]:
        """Blocks whose stored outputs can be inserted while this group's units change, in running order."""
        if self.walk is not None and self.walk.whole is not None:
            return ()
        return self.observed[: self.order.index(self.first_block(group, self.order))]

    def after(self, group: UnitGroup) -> tuple[str, ...]:
        """Blocks whose outputs may change with this group's units, in the order in which they run."""
        return self.observed[len(self.before(group)) :]

    def first_block(self, group: UnitGroup, order: Sequence[int]) -> int:
        """The first block, in this order, with a layer that reads the group's units."""
        reading = [
            index
            for index in order
            if group.coupled and any(path.startswith(f"{self.blocks[index]}.") for path in group.reads)
        ]
        return reading[0] if reading else group.block

    @property
    def convolutional(self) -> bool:
        """Whether channels, but no attention heads, can be removed."""
        return _is_convolutional(self.groups)

    def is_convolutional(self, group: UnitGroup) -> bool:
        """The same for the part of the model in the group's family, for example the backbone of a hybrid."""
        if not self.families:
            return self.convolutional
        family = self.families[group.block]
        return _is_convolutional([one for one in self.groups if self.families[one.block] == family])

    def _has_none(self) -> str:
        if not any(group.found for group in self.groups):
            return f"family {self.family} has none of them"
        return f"by measurement it has {' and '.join(sorted({group.kind for group in self.groups}))} only"

    def only(self, kinds: Iterable[str]) -> Structure:
        """The same structure with only these kinds of units removable; InputError if it has none of them."""
        groups = tuple(group for group in self.groups if group.kind in set(kinds))
        if not groups:
            raise InputError(
                f"the model has no {' or '.join(kinds)}",
                self._has_none(),
                "give other kinds in prune.units",
            )
        return replace(self, groups=groups)


def _is_convolutional(groups: Iterable[UnitGroup]) -> bool:
    kinds = {group.kind for group in groups}
    return "channels" in kinds and "heads" not in kinds


@dataclass(frozen=True)
class Tokens:
    """How the tokens of a stream [batch, tokens, hidden] pass a block, and which of them may be merged.

    prefix: number of tokens at the start that are never merged (class, distillation, registers).
    attend: (block, stream, attention mask or None) -> the stream after the attention, where tokens are merged.
    feed: (block, that stream) -> the block's output.
    pooled: a module whose output is averaged over tokens, and the first token that counts; None if only a token of the
        prefix is read (or if the task module averages itself).
    padded: the inputs hold padding, and an `attention_mask` that says where.
    """

    prefix: int
    attend: Callable[[Any, Any, Any], Any]
    feed: Callable[[Any, Any], Any]
    pooled: tuple[str, int] | None = None
    padded: bool = False


@dataclass(frozen=True)
class Family:
    """An architecture: which modules are its blocks, and where the units of one block are.

    examples: models of this family, as users know them. is_block: whether a module is a block of this family.
    groups: (block module, its path, its index) -> its unit groups, in forward order, and refusals for kinds of units
    that only other variants can lose. Raises InputError for a variant that this family does not support.
    channels_first: its blocks output [batch, features, height, width] (see Structure).
    sublayers: kinds whose sub-layers may lose all their units and are then removed.
    parts: modules of a block, as paths in it, used to find the most similar family for an error.
    chain: instead of `groups`, for networks that are one chain of layers rather than repeated blocks: (a module that
    `is_block` names, its path) -> (its block paths, their unit groups), both in forward order.
    streams: (the whole module, [(path, block)]) -> coupled groups, the channels of the residual streams between blocks.
    refusals: the whole module -> refusals that a single block does not show to `groups`.
    tokens: (the whole module, [(path, block)]) -> how its tokens can be merged. Raises InputError for a variant whose
    tokens cannot.
    query_keys: (a block, its path) -> (its attention, the layers of the queries and of the keys), whose scores are
    q k^T (see `QueryKeys`); None for a variant with a norm or a rotary embedding of them.
    """

    name: str
    library: Literal["transformers", "timm", "torchvision"]
    examples: str
    units: tuple[UnitKind, ...]
    is_block: Callable[[nn.Module], bool]
    groups: Callable[[Any, str, int], tuple[UnitGroup | Refusal, ...]] | None = None
    channels_first: bool = False
    sublayers: tuple[UnitKind, ...] = ()
    parts: tuple[str, ...] = ()
    chain: Callable[[Any, str], tuple[list[str], list[UnitGroup]]] | None = None
    streams: Callable[[nn.Module, Sequence[tuple[str, nn.Module]]], list[UnitGroup]] | None = None
    refusals: Callable[[Any], Sequence[Refusal]] | None = None
    tokens: Callable[[nn.Module, Sequence[tuple[str, nn.Module]]], Tokens] | None = None
    query_keys: Callable[[Any, str], tuple[str, str, str] | None] | None = None


def class_named(*names: str) -> Callable[[nn.Module], bool]:
    """A check of a module's class by its name, without importing the library, which may not be in use."""
    return lambda module: type(module).__name__ in names
