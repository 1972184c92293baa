"""Replaced attentions compute what the library's do."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

from optin_export.models.equivalents import SelfAttention, use_equivalents
from tests.conftest import VIT_ARGS, enlarge

EVA: dict[str, Any] = {**VIT_ARGS, "init_values": 0.5}


@pytest.mark.parametrize(
    ("name", "args"),
    [
        ("beit_base_patch16_224", EVA),
        ("beit_base_patch16_224", {**EVA, "qkv_bias": False, "use_rel_pos_bias": False}),
        ("eva_giant_patch14_224", EVA),
        ("eva02_tiny_patch14_224", {**EVA, "num_reg_tokens": 2}),
        ("eva02_base_patch14_448", {**EVA, "qkv_fused": False}),
        ("eva02_tiny_patch14_224", {**EVA, "qkv_fused": False, "qkv_bias": False, "qk_norm": True}),
    ],
)
def test_the_model_puts_out_what_it_did(name: str, args: dict[str, Any]) -> None:
    import timm

    model = enlarge(timm.create_model(name, **args)).eval()
    for part in model.modules():
        if "fused_attn" in vars(part):
            part.fused_attn = False
    same = copy.deepcopy(model)
    use_equivalents(same)
    replaced = [part for part in same.modules() if isinstance(part, SelfAttention)]
    assert len(replaced) == 3 and not any(isinstance(part, SelfAttention) for part in model.modules())
    images = torch.randn(2, 1, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(same(images), model(images), rtol=1e-5, atol=1e-6)
    assert all(parameter.isfinite().all() for parameter in same.parameters())


@pytest.mark.parametrize(
    ("name", "args"),
    [
        ("beit_base_patch16_224", {**EVA, "use_rel_pos_bias": False, "use_shared_rel_pos_bias": True}),
        ("eva_giant_patch14_224", {**EVA, "scale_attn_inner": True}),
        ("vit_tiny_patch16_224", VIT_ARGS),
    ],
)
def test_what_has_no_equivalent_stays(name: str, args: dict[str, Any]) -> None:
    import timm

    model = timm.create_model(name, **args)
    before = [type(part) for part in model.modules()]
    use_equivalents(model)
    assert [type(part) for part in model.modules()] == before


def test_an_argument_that_is_not_known_is_not_ignored() -> None:
    import timm

    model = timm.create_model("eva_giant_patch14_224", **EVA)
    use_equivalents(model)
    attention = next(part for part in model.modules() if isinstance(part, SelfAttention))
    with pytest.raises(AssertionError, match="attn_mask"):
        attention(torch.zeros(1, 4, 32), attn_mask=torch.ones(4, 4, dtype=torch.bool))
    assert isinstance(attention.qkv, nn.Linear)
