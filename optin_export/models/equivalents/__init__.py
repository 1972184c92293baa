"""Modules that are equivalent to a library's, in a form whose units can be removed.

Each calls its layers as modules, and takes the number of its heads from their weights, or from `num_heads`, and never
from the width of its input. Other modules compute in every pass what they would keep between passes.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from optin_export.models.equivalents.caches import without_cache
from optin_export.models.equivalents.conv_positions import heads_of_weights
from optin_export.models.equivalents.fused import SelfAttention, fused_projection
from optin_export.models.equivalents.gated import gated_biases
from optin_export.models.equivalents.inherited import can_be_separate, separate_inherited
from optin_export.models.equivalents.multihead import MultiheadAttention, call_layers_in_turn
from optin_export.models.equivalents.narrow import NarrowAttention, NarrowSelfAttention
from optin_export.models.equivalents.relative import separate_projections_by_head
from optin_export.models.equivalents.windows import WindowAttention

__all__ = ["MultiheadAttention", "NarrowAttention", "NarrowSelfAttention", "SelfAttention"]
__all__ += ["WindowAttention", "use_equivalents"]

#: Models of transformers whose families leave nn.MultiheadAttention whole.
_KEPT = tuple(f"transformers.models.{name}." for name in ("mask2former", "siglip", "siglip2"))


def use_equivalents(module: nn.Module) -> None:
    """Replace modules that have an equivalent, in place; a norm or gate across heads, or a shared table, has none.

    A module that is used in several places is replaced by one module.
    """
    if getattr(module, "rel_pos_bias", None) is not None:
        return
    call_layers_in_turn(module)
    replaced: dict[nn.Module, nn.Module] = {}
    for parent in list(module.modules()):
        keeps = type(parent).__module__.startswith(_KEPT)
        for name, child in list(parent._modules.items()):
            if child is not None and not keeps:
                if child not in replaced:
                    replaced[child] = _equivalent(child)
                parent._modules[name] = replaced[child]


def _equivalent(child: Any) -> nn.Module:
    """A module that computes the same; the module itself, without its caches, where that is enough."""
    where = f"{type(child).__module__}.{type(child).__name__}"
    if isinstance(child, nn.MultiheadAttention) and child.bias_k is None and not child.add_zero_attn:
        if type(child) is nn.MultiheadAttention:
            return MultiheadAttention(child)
        if can_be_separate(child):
            separate_inherited(child)
    if where in ("timm.models.beit.Attention", "timm.models.eva.EvaAttention"):
        is_plain = isinstance(getattr(child, "norm", nn.Identity()), nn.Identity)
        return SelfAttention(child) if is_plain and getattr(child, "gate", None) is None else child
    if where.startswith("torchvision.models.swin_transformer.ShiftedWindowAttention"):
        return WindowAttention(child)
    if where == "timm.models.swin_transformer_v2.WindowAttention" and child.q_bias is not None:
        child.qkv, child.q_bias, child.v_bias = fused_projection(child), None, None
    if where == "transformers.models.wavlm.modeling_wavlm.WavLMAttention":
        gated_biases(child)
    if where == "timm.models.coat.FactorAttnConvRelPosEnc":
        heads_of_weights(child)
    if where == "transformers.models.xlnet.modeling_xlnet.XLNetRelativeAttention":
        separate_projections_by_head(child)
    without_cache(child)
    return child
