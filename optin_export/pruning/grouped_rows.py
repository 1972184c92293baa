"""Cut output features of a grouped convolution whose input features all stay: its groups may lose different numbers."""

from __future__ import annotations

import functools
from collections.abc import Collection
from typing import Any

import torch
from torch import nn

#: The buffer with the number of output features of each group. It is saved with the weights.
ROWS = "rows_of_groups"


def cut_rows_of_groups(layer: Any, removed: Collection[int]) -> None:
    """Cut these output features, in place. Groups of equal size stay one convolution, others are computed one by one.

    layer: nn.Conv1d, Conv2d or Conv3d with torch's own forward.
    """
    if not hasattr(layer, ROWS):
        layer.register_buffer(ROWS, torch.full([layer.groups], layer.out_channels // layer.groups))
        base: Any = type(layer)
        layer.__class__ = _with_own_groups(base)
    rows = layer.get_buffer(ROWS)
    kept = torch.tensor([row for row in range(layer.out_channels) if row not in set(removed)])
    group_of = torch.arange(len(rows)).repeat_interleave(rows)
    rows.copy_(torch.bincount(group_of[kept], minlength=len(rows)))
    layer.weight = nn.Parameter(layer.weight.detach()[kept], requires_grad=False)
    if layer.bias is not None:
        layer.bias = nn.Parameter(layer.bias.detach()[kept], requires_grad=False)
    layer.out_channels = len(kept)
    _arrange(layer)


def _arrange(layer: Any) -> None:
    """Set what follows from the rows of the groups: the sizes of those that have any, and what these read."""
    rows, width = layer.get_buffer(ROWS).tolist(), layer.weight.shape[1]
    if min(rows) < 0 or sum(rows) != len(layer.weight):
        raise ValueError(f"a convolution with {len(layer.weight)} output features has groups of {rows}")
    layer.sizes = [size for size in rows if size]
    layer.groups = len(layer.sizes) if len(set(layer.sizes)) == 1 else 1
    read = [group * width + at for group, size in enumerate(rows) if size for at in range(width)]
    every = len(read) == len(rows) * width
    layer.register_buffer("read", None if every else torch.tensor(read, device=layer.weight.device), persistent=False)


@functools.cache
def _with_own_groups(base: Any) -> Any:
    """The class with a forward for such groups; copied and pickled by its base, as no module has it by name."""

    def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
        dim = x.dim() - 1 - len(self.kernel_size)
        x = x if self.read is None else x.index_select(dim, self.read)
        if len(self.sizes) == self.groups:
            return self._conv_forward(x, self.weight, self.bias)
        biases = [None] * len(self.sizes) if self.bias is None else self.bias.split(self.sizes)
        parts = zip(x.split(self.weight.shape[1], dim), self.weight.split(self.sizes), biases, strict=True)
        return torch.cat([self._conv_forward(*one) for one in parts], dim)

    def load(self: Any, *args: Any) -> None:
        base._load_from_state_dict(self, *args)
        _arrange(self)

    def reduce(self: Any, protocol: int) -> tuple[Any, ...]:
        return _instance, (base,), self.__getstate__()

    own = {"__module__": base.__module__, "__reduce_ex__": reduce, "_load_from_state_dict": load, "forward": forward}
    return type(base.__name__, (base,), own)


def _instance(base: Any) -> Any:
    cls = _with_own_groups(base)
    return cls.__new__(cls)
