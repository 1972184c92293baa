"""Pool token states into one vector, as sentence-transformers does, correctly for any length and padding."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import nn

from optin_export.errors import InputError


def _weighted_mean(hidden: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
    weight = counts.unsqueeze(-1).to(hidden.dtype)
    return (hidden * weight).sum(1) / weight.sum(1).clamp(min=1e-9)


def _mean_sqrt_len(hidden: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
    weight = counts.unsqueeze(-1).to(hidden.dtype)
    return (hidden * weight).sum(1) / weight.sum(1).clamp(min=1e-9).sqrt()


def _by_position(hidden: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
    """The mean weighted by positions 1..n. All weights are divided by n, so that their sum fits a half precision."""
    positions = _positions(hidden)
    return _weighted_mean(hidden, (counts * positions).to(hidden.dtype) / positions[-1])


def _max(hidden: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
    return hidden.masked_fill(counts.unsqueeze(-1) == 0, torch.finfo(hidden.dtype).min).amax(1)


def _last(hidden: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
    positions = _positions(hidden)
    return _chosen(hidden, positions == (counts * positions).amax(1, keepdim=True))


def _first(hidden: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
    return hidden[:, 0]


#: By the names of `model.pooling`: (hidden [batch, tokens, features], counts [batch, tokens]) -> [batch, features].
#: counts: 0 for tokens that are left out, else 1 (or the number of original tokens per token, if merged).
POOLINGS: dict[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {
    "mean": _weighted_mean,
    "cls": _first,
    "max": _max,
    "last": _last,
    "weightedmean": _by_position,
    "mean_sqrt_len": _mean_sqrt_len,
}
#: Poolings that stay correct with merged tokens.
MERGEABLE = ("mean", "cls")


class Pooling(nn.Module):
    """One or several poolings of token states, concatenated.

    forward(hidden [batch, tokens, features], counts [batch, tokens]) -> [batch, features x number of modes].
    skip: number of tokens at the start to leave out, those of a prompt. Raises InputError for an unknown mode.
    """

    def __init__(self, modes: Sequence[str], skip: int = 0) -> None:
        super().__init__()
        unknown = next((mode for mode in modes if mode not in POOLINGS), None)
        if unknown is not None or not modes:
            raise InputError(f"unknown pooling '{unknown}'", f"known: {', '.join(POOLINGS)}", "use one of these")
        self.modes, self.skip = tuple(modes), skip

    def forward(self, hidden: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
        if self.skip:
            counts = counts * (_positions(hidden) > self.skip)
        pooled = [self._pool(mode, hidden, counts) for mode in self.modes]
        return pooled[0] if len(pooled) == 1 else torch.cat(pooled, -1)

    def _pool(self, mode: str, hidden: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
        if mode == "cls" and self.skip:
            # The first token after the prompt; for a text without one, the first token.
            first = torch.where(counts.sum(1, keepdim=True) > 0, self.skip + 1, 1)
            return _chosen(hidden, _positions(hidden) == first)
        return POOLINGS[mode](hidden, counts)


def _positions(hidden: torch.Tensor) -> torch.Tensor:
    """[tokens]: 1, 2, ... int64, which stays exact where everything else is computed in half precision."""
    return torch.arange(1, hidden.shape[1] + 1, device=hidden.device)


def _chosen(hidden: torch.Tensor, chosen: torch.Tensor) -> torch.Tensor:
    """The chosen token of every row (bool [batch, tokens], one per row), by a product instead of a gather."""
    return (hidden * chosen.unsqueeze(-1).to(hidden.dtype)).sum(1)
