"""Run a model block by block: the order of its blocks, and the readers of their outputs."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

import torch

from optin_export.units.outputs import map_tensors, placeholder


@dataclass(frozen=True)
class Walk:
    """The measurements on one model; see `topology`.

    order: indices of the blocks that run, or whose layers do, in the order in which they first run.
    whole: why every pass has to run the whole model; None if the outputs of earlier blocks can be replayed.
    readers: per block and tensor of its output, the last position in `order` at which it is read; -1: never,
    len(order): it is read after the last block.
    rewritten: modules whose output is overwritten in place later in the pass.
    sample_dims: per block and tensor of its output, and per layer that reads units and its input, the dimension that
    counts samples; None if none does (a position bias for all).
    calls: how often a module runs in one pass, if not once; 0 for one that does not run.
    silent: blocks in `order` whose layers run although the block itself is never called.
    idle: groups of units that no layer reads in a pass.
    blind: layers through which no gradients flow back, although the pass requests them.
    mutates: whether the model writes over tensors in place that gradients need (see `gradients`).
    """

    order: tuple[int, ...]
    whole: str | None = None
    readers: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    rewritten: frozenset[str] = frozenset()
    sample_dims: Mapping[str, tuple[int | None, ...]] = field(default_factory=dict)
    calls: Mapping[str, int] = field(default_factory=dict)
    silent: frozenset[str] = frozenset()
    idle: tuple[str, ...] = ()
    blind: tuple[str, ...] = ()
    mutates: bool = False

    def gradients(self) -> AbstractContextManager[Any]:
        """A context for a forward pass and its backward passes; saves tensors before the model overwrites them."""
        return torch.autograd.graph.allow_mutation_on_saved_tensors() if self.mutates else contextlib.nullcontext()

    def last_reader(self, path: str) -> int:
        """The position at which the last of this block's tensors is read."""
        return max(self.readers.get(path, (-1,)), default=-1)

    def kept(self, path: str, output: Any, position: int) -> Any:
        """The parts of a block's output that a pass reads which continues from block `order[position]`.

        Tensors that are no longer read are zeros that occupy no memory.
        """
        readers = self.readers.get(path, ())

        def keep(number: int, tensor: torch.Tensor) -> torch.Tensor:
            return tensor if number < len(readers) and readers[number] >= position else placeholder(tensor)

        return map_tensors(output, keep)

    def sample_dim(self, path: str) -> int:
        """The dimension of a block's hidden states, or of a layer's input, that counts samples."""
        return next((dim for dim in self.sample_dims.get(path, ())[:1] if dim is not None), 0)

    def repeated(self, path: str, output: Any, copies: int) -> Any:
        """A block's output for the batch repeated several times, one copy after another."""
        dims = self.sample_dims.get(path, ())

        def repeat(number: int, tensor: torch.Tensor) -> torch.Tensor:
            dim = dims[number] if number < len(dims) else 0
            if dim is None or not tensor.dim():
                return tensor.clone()
            return tensor.repeat(*(copies if at == dim else 1 for at in range(tensor.dim())))

        return map_tensors(output, repeat)
