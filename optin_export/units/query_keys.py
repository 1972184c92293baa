"""Attentions whose scores are q k^T alone: their queries and keys may have fewer dimensions than their values."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

#: The kind of these units in plans and reports.
DIMENSIONS: Literal["dimensions"] = "dimensions"


@dataclass(frozen=True)
class QueryKeys:
    """The queries and keys of one attention. Nothing but their product reads them: no norm, rotary embedding or cache.

    Units are dimensions per head, the same number in every head of the attention, in any basis: q k^T is the same for
    q A and k A^-T.

    block: its block. path: the module. query, key: the layers that make them; the same layer twice if it makes queries,
    keys and values one after another. heads: key of the group of its heads. count: dimensions per head.
    """

    block: int
    path: str
    query: str
    key: str
    heads: str
    count: int

    @property
    def name(self) -> str:
        """The key of these units in a plan."""
        return f"block{self.block:02d}.{DIMENSIONS}"

    @property
    def is_fused(self) -> bool:
        return self.query == self.key

    def rows(self, outputs: int, which: str) -> slice:
        """The output rows of the queries' ("query") or the keys' ("key") layer, which has this many, of all heads."""
        if not self.is_fused:
            return slice(0, outputs)
        size = outputs // 3
        return slice(0, size) if which == "query" else slice(size, 2 * size)

    def heads_of(self, rows: torch.Tensor) -> torch.Tensor:
        """Rows of queries or keys [heads * dimensions, ...] as [heads, dimensions, ...]."""
        return rows.unflatten(0, (-1, self.count))
