"""XLNet's attention with a layer for each projection, which it keeps as tensors [features, heads, width of a head]."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from optin_export.models.equivalents.adapted import adapt


def separate_projections_by_head(attention: Any) -> None:
    """Give an XLNetRelativeAttention layers for queries, keys, values, positions and the output, in place.

    Its other methods stay. The number of heads is what the weights have.
    """
    for name in ("q", "k", "v", "r"):
        _as_layer(attention, name, getattr(attention, name).detach().flatten(1).T)
    _as_layer(attention, "o", attention.o.detach().flatten(1))
    adapt(attention, _layers)


def _as_layer(attention: Any, name: str, weight: torch.Tensor) -> None:
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    layer.weight = nn.Parameter(weight.contiguous().clone())
    delattr(attention, name)
    setattr(attention, name, layer)


def _layers(base: Any) -> dict[str, Any]:
    def forward(
        self: Any,
        h: torch.Tensor,
        g: None,
        attn_mask_h: torch.Tensor | None,
        attn_mask_g: torch.Tensor | None,
        r: torch.Tensor,
        seg_mat: torch.Tensor | None,
        mems: torch.Tensor | None = None,
        target_mapping: None = None,
        output_attentions: bool = False,
    ) -> tuple[Any, ...]:
        """h: [tokens, batch, features]; r: encodings of distances [distances, batch, features]. One stream only."""
        assert g is None and target_mapping is None, "attention of two streams, which only pretraining uses"
        read = h if mems is None or mems.dim() < 2 else torch.cat([mems, h], dim=0)
        inputs = (self.q, h), (self.k, read), (self.v, read), (self.r, r.type(self.r.weight.dtype))
        q, k, v, positions = (layer(one).unflatten(-1, (-1, self.d_head)) for layer, one in inputs)
        found = self.rel_attn_core(
            q, k, v, positions, seg_mat=seg_mat, attn_mask=attn_mask_h, output_attentions=output_attentions
        )
        attended, shown = found if output_attentions else (found, None)
        output = self.post_attention(h, attended)
        return (output, None, shown) if output_attentions else (output, None)

    def post_attention(self: Any, h: torch.Tensor, attn_vec: torch.Tensor, residual: bool = True) -> torch.Tensor:
        added = self.dropout(self.o(attn_vec.flatten(2)))
        normed: torch.Tensor = self.layer_norm(added + h if residual else added)
        return normed

    return {"forward": forward, "post_attention": post_attention}
