"""Token merging: in each block a fixed number of tokens is averaged into similar ones, inside the graph.

After Bolya et al., "Token Merging: Your ViT But Faster" (ICLR 2023, section 3), re-derived from the paper. Between the
attention and the FFN of a block the tokens are split alternately into two sets; every token of the first set is paired
with the most similar one of the second set; the r most similar pairs are replaced by their average, weighted by the
number of tokens that each already represents. Shapes are static: TopK and products with one-hot matrices, no scatter.

Padding has size 0: it is merged before any real token, and it never enters an average.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from optin_export.models import Inputs, TaskModel
from optin_export.units import Structure, Tokens, attach, block_outputs, get_module, tensor_of

#: Larger than any difference of cosines: the distance of padding from real tokens.
FAR = 4.0
#: Added to the attention scores of padding.
NEVER = -1e9


@dataclass(frozen=True)
class Pairing:
    """Which tokens stay and which are merged, as one-hot rows over the first set of a bipartite split.

    prefix: number of tokens at the start that are never merged. stay: [batch, first - merged, first]. join: [batch,
    second, first], zero columns for the tokens that stay.
    """

    prefix: int
    stay: torch.Tensor
    join: torch.Tensor

    def sums(self, rows: torch.Tensor) -> torch.Tensor:
        """[batch, tokens, features] -> [batch, tokens - merged, features], each row the sum over the merged tokens."""
        first, second = rows[:, self.prefix :: 2], rows[:, self.prefix + 1 :: 2]
        return torch.cat([rows[:, : self.prefix], self.stay @ first, self.join @ first + second], 1)


def pair(stream: torch.Tensor, sizes: torch.Tensor | None, merged: int, prefix: int) -> Pairing:
    """Pair the `merged` most similar tokens (cosine) of a bipartite split of stream [batch, tokens, hidden].

    sizes: [batch, tokens], how many tokens each represents, 0 for padding; None if there is no padding.
    """
    rows = F.normalize(stream[:, prefix:], dim=-1)
    alike = rows[:, ::2] @ rows[:, 1::2].mT
    if sizes is not None:
        padding = sizes[:, prefix:] == 0
        alike = alike - FAR * padding[:, None, 1::2]
    best, partner = alike.max(2)
    first, second = (torch.arange(count, device=stream.device) for count in alike.shape[1:])
    if sizes is not None:
        # Merge the last padding first: the other tokens keep their place in the next split, however ties are broken.
        best = torch.where(padding[:, ::2], FAR + first, best)
    chosen = best.topk(merged, dim=1).indices
    stays = 1 - (chosen[:, :, None] == first).to(stream.dtype).sum(1)
    # Restore the original order: an engine's TopK may return another one, and the next split depends on it.
    place = stays * stays.cumsum(1)
    stay = (place[:, None] == 1 + first[: len(first) - merged, None]).to(stream.dtype)
    join = (partner[:, None] == second[:, None]).to(stream.dtype) * (1 - stays)[:, None]
    return Pairing(prefix, stay, join)


def merge(
    stream: torch.Tensor, sizes: torch.Tensor | None, merged: int, prefix: int, padded: bool = False
) -> tuple[torch.Tensor, torch.Tensor, Pairing]:
    """Merge `merged` tokens of stream [batch, tokens, hidden]; returns (shorter stream, its sizes, the pairing).

    The sum of size x token over all tokens is conserved. sizes: [batch, tokens], None for all 1. padded: whether a size
    may be 0.
    """
    pairing = pair(stream, sizes if padded else None, merged, prefix)
    weight = torch.ones_like(stream[:, :, :1]) if sizes is None else sizes[:, :, None]
    summed = pairing.sums(torch.cat([stream * weight, weight], 2))
    total = summed[:, :, -1:]
    means = summed[:, :, :-1] / (total.clamp(min=1.0) if padded else total)
    return means, total[:, :, 0], pairing


@dataclass(frozen=True)
class DroppedTokens:
    """Maps original to merged tokens. place: [batch, tokens of the unmerged model]; sizes: [batch, tokens]."""

    place: torch.Tensor
    sizes: torch.Tensor

    @property
    def sources(self) -> torch.Tensor:
        return F.one_hot(self.place, self.sizes.shape[1]).mT.to(self.sizes.dtype)

    def sums(self, rows: torch.Tensor) -> torch.Tensor:
        """[batch, tokens of the unmerged model, features] -> [batch, tokens, features], sums over the merged tokens."""
        return self.sources @ rows

    def means(self, rows: torch.Tensor) -> torch.Tensor:
        return self.sums(rows) / self.sources.sum(2, keepdim=True).clamp(min=1.0)

    def spread(self, rows: torch.Tensor) -> torch.Tensor:
        """The inverse: every token of the unmerged model gets the row of the token that represents it."""
        return rows.gather(1, self.place[:, :, None].expand(-1, -1, rows.shape[2]))


#: None: nothing was merged yet.
MergedTokens = DroppedTokens | None


@dataclass
class Flow:
    """The state of merging in the running forward pass; one object shared by all blocks of a model.

    sizes: [batch, tokens] or None before anything was merged. sources: with `trace`, 0/1 [batch, tokens, tokens of the
    unmerged model], which tokens each one represents.
    """

    sizes: torch.Tensor | None = None
    sources: torch.Tensor | None = None
    trace: bool = field(default=False, compare=False)

    def __deepcopy__(self, memo: dict[int, Any]) -> Flow:
        # This state belongs to a pass of the model it was copied from.
        memo[id(self)] = new = Flow(trace=self.trace)
        return new

    def state(self) -> MergedTokens:
        """The current state of the pass, in compact form."""
        if self.sources is None or self.sizes is None:
            return None
        return DroppedTokens(self.sources.argmax(1), self.sizes)

    def restore(self, state: MergedTokens) -> None:
        """Continue from a `state`: blocks before it are replayed, not run."""
        self.sizes = None if state is None else state.sizes
        self.sources = None if state is None else state.sources

    def weights(self) -> torch.Tensor:
        """[batch, tokens]: the weight of each of the last tokens in a mean over tokens."""
        assert self.sizes is not None
        return self.sizes


@dataclass
class Merging:
    """A block that merges `merged` tokens after its attention. first: nothing was merged before."""

    tokens: Tokens
    flow: Flow
    merged: int
    first: bool

    def run(self, block: Any, stream: torch.Tensor, mask: torch.Tensor | None) -> Any:
        flow, tokens = self.flow, self.tokens
        if self.first:
            flow.sizes = flow.sources = None
            if tokens.padded and mask is not None:
                flow.sizes = _valid(mask).to(stream.dtype)
        elif flow.sizes is not None:
            mask = _log_sizes(flow.sizes)[:, None, None]
        stream = tokens.attend(block, stream, mask)
        if self.merged:
            before = stream.shape[1]
            stream, flow.sizes, pairing = merge(stream, flow.sizes, self.merged, tokens.prefix, tokens.padded)
            if flow.trace:
                every = torch.eye(before, device=stream.device).expand(len(stream), -1, -1)
                flow.sources = pairing.sums(every if flow.sources is None else flow.sources)
        return tokens.feed(block, stream)


def _log_sizes(sizes: torch.Tensor) -> torch.Tensor:
    """A term for the attention scores, by which a token counts as all tokens that it represents, and padding as none.

    Paper, section 3: proportional attention.
    """
    return torch.where(sizes > 0, sizes.clamp(min=1.0).log(), NEVER)


def _valid(mask: torch.Tensor) -> torch.Tensor:
    """bool [batch, tokens] from a boolean or additive attention mask [batch, 1, 1 or tokens, tokens]."""
    row = mask[:, 0, 0] if mask.dim() == 4 else mask
    return row if row.dtype == torch.bool else row > NEVER / 2 if row.is_floating_point() else row > 0


def insert_merging(model: TaskModel, structure: Structure, tokens: Tokens, merged: Sequence[int]) -> TaskModel:
    """A copy of `model` that merges `merged[i]` tokens in block i; nothing is merged in blocks beyond its end.

    `search.check_merging` says what can be merged. Without any merging the copy equals the model.
    """
    model = copy.deepcopy(model)
    counts = [*merged, *[0] * (len(structure.blocks) - len(merged))]
    begin = next((block for block, count in enumerate(counts) if count), None)
    if begin is None:
        return model
    flow = Flow()
    for index, path in enumerate(structure.blocks):
        # Every block after the first merging one uses sizes in its attention.
        if index >= begin:
            block: Any = get_module(model, path)
            block.__class__ = _merging_class(type(block))
            block.merging = Merging(tokens, flow, counts[index], index == begin)
    if tokens.pooled is not None:
        path, start = tokens.pooled
        attach(get_module(model, path), _Pooled(flow, start).weigh)
    if tokens.padded:
        model.token_weights = flow.weights
    return model


def flow_of(model: nn.Module) -> Flow | None:
    """The state that the blocks of a model that merges tokens share; None for other models."""
    return next((module.merging.flow for module in model.modules() if hasattr(module, "merging")), None)  # type: ignore[union-attr,return-value]


def places(model: TaskModel, inputs: Inputs) -> torch.Tensor | None:
    """[batch, tokens of the unmerged model]: index of the final token that represents each; None if none is merged."""
    flow = flow_of(model)
    if flow is None:
        return None
    flow.trace = True
    with torch.no_grad():
        model(**inputs)
    flow.trace, state = False, flow.state()
    return None if state is None else state.place


def count_tokens(model: TaskModel, structure: Structure, inputs: Inputs) -> int:
    """Tokens that enter the first block at the shape of `inputs`, for a model that merges none."""
    with torch.no_grad(), block_outputs(model, structure.blocks[:1]) as outputs:
        model(**inputs)
    return tensor_of(outputs[structure.blocks[0]]).shape[1]


@dataclass
class _Pooled:
    """Turns a plain mean over the rows from `start` into the mean over the tokens that they represent."""

    flow: Flow
    start: int

    def weigh(self, module: nn.Module, args: Any, output: torch.Tensor) -> torch.Tensor:
        assert self.flow.sizes is not None
        sizes = self.flow.sizes[:, self.start :, None]
        return torch.cat([output[:, : self.start], output[:, self.start :] * (sizes / sizes.mean(1, keepdim=True))], 1)


def _merging_class(base: Any) -> Any:
    """The block's class with another forward; paths, weights and the class name, which other code checks, are kept."""

    def forward(self: Any, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        return self.merging.run(self, hidden_states, kwargs.get("attention_mask", args[0] if args else None))

    return type(base.__name__, (base,), {"forward": forward, "__module__": base.__module__})
