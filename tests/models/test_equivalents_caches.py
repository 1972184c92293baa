"""Attentions that keep their position biases between passes compute them in every pass."""

from __future__ import annotations

import copy
import importlib
from typing import Any

import pytest
import torch
from torch import nn

from optin_export.models.equivalents import use_equivalents

HEADS, WIDTH = 4, 8
#: Class: (its arguments, its inputs).
TOKENS, IMAGE = torch.randn(2, 16, 32), torch.randn(2, 32, 4, 4)
PLAIN: dict[str, Any] = {"dim": 32, "num_heads": HEADS, "resolution": (4, 4), "key_dim": WIDTH}
DOWN = {name: value for name, value in PLAIN.items() if name != "dim"} | {"in_dim": 32, "out_dim": 32}
CASES: dict[str, tuple[dict[str, Any], torch.Tensor]] = {
    "timm.models.efficientformer.Attention": (PLAIN, TOKENS),
    "timm.models.efficientformer_v2.Attention2d": (PLAIN, IMAGE),
    "timm.models.efficientvit_msra.CascadedGroupAttention": ({**PLAIN, "resolution": 4, "attn_ratio": 1.0}, IMAGE),
    "timm.models.levit.Attention": (PLAIN, TOKENS),
    "timm.models.levit.AttentionDownsample": (DOWN, TOKENS),
    "timm.models.tiny_vit.Attention": (PLAIN, TOKENS),
    "transformers.models.levit.modeling_levit.LevitAttention": (
        {
            "hidden_sizes": 32,
            "key_dim": WIDTH,
            "num_attention_heads": HEADS,
            "attention_ratio": 1,
            "resolution": 4,
        },
        TOKENS,
    ),
}


def made(name: str) -> Any:
    module, _, cls = name.rpartition(".")
    torch.manual_seed(0)
    attention = getattr(importlib.import_module(module), cls)(**CASES[name][0])
    attention.eval()  # theirs does not return the module
    with torch.no_grad():
        for parameter in attention.parameters():
            parameter.copy_(torch.randn(parameter.shape) * 0.3)
    return nn.ModuleList([attention])


@pytest.mark.parametrize("name", CASES)
def test_biases_that_change_after_a_pass_have_an_effect(name: str) -> None:
    original, x = made(name), CASES[name][1]
    other = copy.deepcopy(original)
    use_equivalents(other)
    with torch.no_grad():
        before = original[0](x)
        torch.testing.assert_close(other[0](x), before, rtol=0, atol=0)
        for one in (original, other):
            one[0].attention_biases.mul_(-5)
        assert torch.equal(original[0](x), before)
        assert not torch.allclose(other[0](x), before, atol=1e-3)


def test_a_second_time_changes_nothing() -> None:
    parent = made("timm.models.levit.Attention")
    use_equivalents(parent)
    use_equivalents(parent)
    assert len(parent[0]._forward_pre_hooks) == 1


def test_other_dictionaries_stay() -> None:
    layer: Any = nn.Linear(2, 2)
    layer.names = {"a": 1}
    use_equivalents(parent := nn.ModuleList([layer]))
    parent[0](torch.ones(1, 2))
    assert layer.names == {"a": 1}
