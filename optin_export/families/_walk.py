"""How a model can be walked block by block: in which order its blocks run, and who reads what they hand on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from optin_export.families._outputs import map_tensors, placeholder


@dataclass(frozen=True)
class Walk:
    """What was measured on one model; see `_topology`.

    order: indices of the blocks that run, or whose layers do, in the order in which they first run.
    whole: why every pass has to be a whole forward pass; None where the outputs of blocks that come earlier can be
    put in their place.
    readers: per block and tensor of its output, the last position in `order` at which it is read; -1: nobody reads it,
    len(order): it is read behind the last block.
    rewritten: modules whose output is written over in place later in the pass.
    shared: per block and tensor, whether its first dimension does not count samples (a position bias for all).
    calls: how often a module runs in one pass, where that is not once; 0 for one that does not run.
    silent: blocks in `order` whose layers run although the block itself is never called.
    idle: groups of units that no layer reads in a pass.
    """

    order: tuple[int, ...]
    whole: str | None = None
    readers: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    rewritten: frozenset[str] = frozenset()
    shared: Mapping[str, tuple[bool, ...]] = field(default_factory=dict)
    calls: Mapping[str, int] = field(default_factory=dict)
    silent: frozenset[str] = frozenset()
    idle: tuple[str, ...] = ()

    def last_reader(self, path: str) -> int:
        """The position at which the last of this block's tensors is read."""
        return max(self.readers.get(path, (-1,)), default=-1)

    def kept(self, path: str, output: Any, position: int) -> Any:
        """A block's output for a pass that goes on from block `order[position]`: what is read from there on.

        Tensors that nobody reads any more are zeros that occupy no memory.
        """
        readers = self.readers.get(path, ())

        def keep(number: int, tensor: torch.Tensor) -> torch.Tensor:
            return tensor if number < len(readers) and readers[number] >= position else placeholder(tensor)

        return map_tensors(output, keep)

    def repeated(self, path: str, output: Any, copies: int) -> Any:
        """A block's output for the batch several times over, one copy after another."""
        shared = self.shared.get(path, ())

        def repeat(number: int, tensor: torch.Tensor) -> torch.Tensor:
            if number < len(shared) and shared[number]:
                return tensor.clone()
            return tensor.repeat(copies, *[1] * (tensor.dim() - 1))

        return map_tensors(output, repeat)
