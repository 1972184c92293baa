"""Heads of the attentions of timm and torchvision that take sizes from their input are found and removed exactly."""

from __future__ import annotations

import importlib
from typing import Any

import pytest
import torch
from torch import nn

from optin_export.models.equivalents import use_equivalents
from optin_export.pruning import verified
from optin_export.units.discovery import found_structure
from optin_export.units.trace import observe_pass
from tests.conftest import enlarge
from tests.pruning.test_verify import check_plans

HEADS, WIDTH = 4, 8
PLAIN: dict[str, Any] = {"dim": 32, "num_heads": HEADS}
WINDOW = {**PLAIN, "window_size": (4, 4)}
BY_WIDTH = {"dim": 32, "head_dim": WIDTH}
#: Class: (its arguments, the shape of a row of 16 tokens, further inputs).
CASES: dict[str, tuple[dict[str, Any], tuple[int, ...], tuple[Any, ...]]] = {
    "timm.models.cait.ClassAttn": (PLAIN, (16, 32), ()),
    "timm.models.convit.GPSA": (PLAIN, (16, 32), ()),
    "timm.models.convit.MHSA": (PLAIN, (16, 32), ()),
    "timm.models.davit.ChannelAttention": (PLAIN, (16, 32), ()),
    "timm.models.davit.ChannelAttentionV2": (PLAIN, (16, 32), ()),
    "timm.models.davit.WindowAttention": (WINDOW, (16, 32), ()),
    "timm.models.edgenext.CrossCovarianceAttn": (PLAIN, (16, 32), ()),
    "timm.models.fastvit.Attention": (BY_WIDTH, (32, 4, 4), ()),
    "timm.models.gcvit.WindowAttentionGlobal": ({**WINDOW, "use_global": False}, (16, 32), ()),
    "timm.models.metaformer.Attention": (BY_WIDTH, (16, 32), ()),
    "timm.models.nextvit.EfficientAttention": ({**BY_WIDTH, "sr_ratio": 2}, (16, 32), ()),
    "timm.models.pvt_v2.Attention": ({**PLAIN, "sr_ratio": 2}, (16, 32), ([4, 4],)),
    "timm.models.swin_transformer_v2.WindowAttention": (WINDOW, (16, 32), ()),
    "timm.models.swin_transformer_v2_cr.WindowMultiHeadAttention": (WINDOW, (16, 32), ()),
    "timm.models.twins.GlobalSubSampleAttn": ({**PLAIN, "sr_ratio": 2}, (16, 32), ((4, 4),)),
    "timm.models.twins.LocallyGroupedAttn": ({**PLAIN, "ws": 3}, (16, 32), ((4, 4),)),
    "timm.models.vision_transformer_relpos.RelPosAttention": (PLAIN, (16, 32), ()),
    "timm.models.volo.Attention": (PLAIN, (4, 4, 32), ()),
    "timm.models.xcit.ClassAttn": (PLAIN, (16, 32), ()),
    "timm.models.xcit.XCA": (PLAIN, (16, 32), ()),
    "torchvision.models.maxvit.RelativePositionalMultiHeadAttention": (
        {"feat_dim": 32, "head_dim": WIDTH, "max_seq_len": 16},
        (1, 16, 32),
        (),
    ),
}


class Around(nn.Module):
    """A layer, the attention, and a layer that reads its output token by token."""

    def __init__(self, attention: nn.Module, shape: tuple[int, ...], more: tuple[Any, ...]) -> None:
        super().__init__()
        self.stem, self.attention, self.head = nn.Linear(32, 32), attention, nn.Linear(32, 3)
        self.shape, self.more = shape, more

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        x = x.mT.unflatten(2, (4, 4)) if self.shape[0] == 32 else x.unflatten(1, self.shape[:-1])
        x = self.attention(x, *self.more)
        return self.head(x.flatten(2).mT if self.shape[0] == 32 else x)


@pytest.mark.parametrize("name", CASES)
def test_heads_are_found_and_removed_exactly(name: str) -> None:
    arguments, shape, more = CASES[name]
    module, _, cls = name.rpartition(".")
    torch.manual_seed(0)
    model: Any = Around(getattr(importlib.import_module(module), cls)(**arguments), shape, more)
    for part in model.modules():
        if "fused_attn" in vars(part):
            part.fused_attn = False
    enlarge(model).eval().requires_grad_(False)
    use_equivalents(model)
    inputs = {"x": torch.randn(2, 16, 32)}
    structure = verified(model, found_structure(model, inputs, observe_pass(model, inputs), None), inputs)
    assert [group.count for group in structure.groups if group.kind == "heads"] == [HEADS]
    check_plans(model, structure, inputs)
