"""Let an attention follow its weights, although its code takes sizes from the width of its input.

`x.reshape(batch, tokens, width)` is exact as long as the attention's heads fill the width. With fewer heads, only the
last size is wrong. Here it is left open (-1), which is the same size for the whole module.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

_RESHAPES = (torch.Tensor.reshape, torch.Tensor.view, torch.reshape)

#: Their sizes follow from the width of the input.
FOLLOWING = (
    "timm.models.cait.ClassAttn",
    "timm.models.convit.GPSA",
    "timm.models.convit.MHSA",
    "timm.models.davit.ChannelAttention",
    "timm.models.davit.ChannelAttentionV2",
    "timm.models.davit.WindowAttention",
    "timm.models.edgenext.CrossCovarianceAttn",
    "timm.models.fastvit.Attention",
    "timm.models.gcvit.WindowAttentionGlobal",
    "timm.models.metaformer.Attention",
    "timm.models.nest.Attention",
    "timm.models.nextvit.EfficientAttention",
    "timm.models.pvt_v2.Attention",
    "timm.models.swin_transformer_v2.WindowAttention",
    "timm.models.swin_transformer_v2_cr.WindowMultiHeadAttention",
    "timm.models.twins.LocallyGroupedAttn",
    "timm.models.vision_transformer_relpos.RelPosAttention",
    "timm.models.volo.Attention",
    "timm.models.xcit.ClassAttn",
    "timm.models.xcit.XCA",
    "torchvision.models.maxvit.RelativePositionalMultiHeadAttention",
)
#: They keep the biases of the first pass, also for weights that are changed afterwards.
UNCACHED = (
    "timm.models.efficientformer.Attention",
    "timm.models.efficientformer_v2.Attention2d",
    "timm.models.efficientformer_v2.Attention2dDownsample",
    "timm.models.efficientvit_msra.CascadedGroupAttention",
    "timm.models.levit.Attention",
    "timm.models.levit.AttentionDownsample",
    "timm.models.tiny_vit.Attention",
)


def follow_weights(module: nn.Module) -> None:
    """Leave the last size of every reshape in a module's forward open, in place.

    Its result is the same; with fewer heads, widths follow. Its class keeps its name, and its layers their paths.
    """
    adapt(module, _following)


def without_cache(module: nn.Module) -> None:
    """Make an attention read its position biases from the parameter at every pass, in place."""
    adapt(module, _uncached)


def subsampled(attention: Any) -> None:
    """Give a GlobalSubSampleAttn of timm's Twins, which divides the input's width by its heads, the forward of PVT v2.

    Both compute the same; that of PVT v2 knows the width of a head.
    """
    attention.head_dim, attention.pool, attention.act = attention.dim // attention.num_heads, None, None
    adapt(attention, _subsampled)


class _LastSizeOpen(TorchFunctionMode):
    def __torch_function__(
        self, func: Any, types: Iterable[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func in _RESHAPES and not kwargs:
            sizes = args[1:] if len(args) > 2 or not isinstance(args[1], list | tuple) else tuple(args[1])
            if len(sizes) > 1 and not any(isinstance(size, int) and size == -1 for size in sizes):
                args = (args[0], (*sizes[:-1], -1))
        return func(*args, **(kwargs or {}))


def _following(base: Any) -> dict[str, Any]:
    @functools.wraps(base.forward)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        with _LastSizeOpen():
            return base.forward(self, *args, **kwargs)

    return {"forward": forward}


def _subsampled(base: Any) -> dict[str, Any]:
    from timm.models.pvt_v2 import Attention

    return _following(Attention)


def _uncached(base: Any) -> dict[str, Any]:
    def get_attention_biases(self: Any, device: torch.device) -> torch.Tensor:
        return self.attention_biases[:, self.attention_bias_idxs]

    return {"get_attention_biases": get_attention_biases}


Members = Callable[[Any], dict[str, Any]]


def adapt(module: nn.Module, members: Members) -> None:
    """Give a module other members, in place. members: from its class to them, by name."""
    base: Any = type(module)
    if not hasattr(base, "_adapted_from"):
        module.__class__ = _subclass(base, members)


@functools.cache
def _subclass(base: Any, members: Members) -> Any:
    """The class with other members; copied and pickled by its base, because no module has it by name."""

    def reduce(self: Any, protocol: int) -> tuple[Any, ...]:
        return _instance, (base, members), self.__getstate__()

    own = {"__module__": base.__module__, "__reduce_ex__": reduce, "_adapted_from": base}
    return type(base.__name__, (base,), {**members(base), **own})


def _instance(base: Any, members: Members) -> Any:
    adapted = _subclass(base, members)
    return adapted.__new__(adapted)
