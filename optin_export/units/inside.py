"""Short declarations of the groups inside one block: counts, widths and rows follow from the sizes of its layers."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn

from optin_export.units.declare import Producer, Table, UnitGroup, UnitKind
from optin_export.units.hooks import get_layer


class Inside:
    """A block at `path`: names of modules in what its methods take are relative to it."""

    def __init__(self, block: nn.Module, path: str, index: int) -> None:
        self.block, self.path, self.index = block, path, index

    def at(self, name: str) -> str:
        return f"{self.path}.{name}" if name else self.path

    def heads(self, producers: Iterable[str], consumer: str, count: int, **fields: Any) -> UnitGroup:
        """Attention heads: equal slices of the input of `consumer`, and of each slab of the producers' rows."""
        return self._group("heads", producers, consumer, count, **fields)

    def neurons(self, producers: Iterable[str], consumer: str, **fields: Any) -> UnitGroup:
        """One unit per input of `consumer`."""
        return self._group("neurons", producers, consumer, get_layer(self.block, consumer).weight.shape[1], **fields)

    def _group(
        self,
        kind: UnitKind,
        producers: Iterable[str],
        consumer: str,
        count: int,
        fused: int = 1,
        grouped: bool = False,
        residual: tuple[str, Any] | None = None,
        sizes: Iterable[tuple[str, int]] = (),
        sublayer: str | None = None,
        bypass: Iterable[tuple[str, bool]] = (),
        tables: Iterable[str] = (),
        **fields: Any,
    ) -> UnitGroup:
        """fused: slabs in each producer. grouped: heads may share rows of some producers (grouped queries). tables:
        parameters whose second dimension counts units. The other fields are those of `UnitGroup`."""
        width = get_layer(self.block, consumer).weight.shape[1] // count
        return UnitGroup(
            block=self.index,
            kind=kind,
            count=count,
            width=width,
            producers=tuple(self._producer(name, fused, count, None if grouped else width) for name in producers),
            consumer=self.at(consumer),
            residual=None if residual is None else (self.at(residual[0]), residual[1]),
            sizes=tuple((self.at(name), per_unit) for name, per_unit in sizes),
            sublayer=None if sublayer is None else self.at(sublayer),
            bypass=tuple((self.at(name), returns_tuple) for name, returns_tuple in bypass),
            tables=tuple(Table(self.at(name), dim=1) for name in tables),
            **fields,
        )

    def _producer(self, name: str, fused: int, count: int, width: int | None) -> Producer:
        rows = len(get_layer(self.block, name).weight) // (fused * count)
        return Producer(self.at(name), fused=fused, rows=None if rows == width else rows)
