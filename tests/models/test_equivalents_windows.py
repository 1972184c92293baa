"""torchvision's Swin and Swin V2 with layers that are called as modules, for all shifts and paddings."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

from optin_export.models.equivalents import WindowAttention, use_equivalents
from tests.conftest import enlarge

HEADS, FEATURES = 4, 32
KEPT = torch.cat([torch.arange(8), torch.arange(16, 24)])  # heads 0 and 2


def made(version: int, shift: list[int], window: list[int], bias: bool = True) -> Any:
    from torchvision.models import swin_transformer

    kind = (swin_transformer.ShiftedWindowAttention, swin_transformer.ShiftedWindowAttentionV2)[version - 1]
    return enlarge(nn.ModuleList([kind(FEATURES, window, shift, HEADS, qkv_bias=bias)])).eval()


def swapped(module: nn.Module) -> Any:
    same = copy.deepcopy(module)
    use_equivalents(same)
    assert any(isinstance(part, WindowAttention) for part in same.modules())
    return same


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("shift", [[0, 0], [2, 2], [1, 2], [2, 0], [0, 1]])
@pytest.mark.parametrize("size", [(8, 8), (7, 10), (4, 9), (3, 3)])
def test_every_shift_and_padding(version: int, shift: list[int], size: tuple[int, int]) -> None:
    original = made(version, shift, [4, 4])
    x = torch.randn(2, *size, FEATURES)
    with torch.no_grad():
        torch.testing.assert_close(swapped(original)[0](x), original[0](x), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("bias", [True, False])
def test_windows_that_are_no_squares(version: int, bias: bool) -> None:
    original = made(version, [1, 2], [2, 5], bias)
    x = torch.randn(2, 6, 11, FEATURES)
    with torch.no_grad():
        torch.testing.assert_close(swapped(original)[0](x), original[0](x), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("version", [1, 2])
def test_fewer_heads_are_what_the_weights_have(version: int) -> None:
    original = made(version, [2, 2], [4, 4])
    attention, x = swapped(original)[0], torch.randn(2, 7, 8, FEATURES)
    rows, heads = torch.cat([KEPT + 32 * part for part in range(3)]), torch.tensor([0, 2])
    with torch.no_grad():
        attention.qkv.weight, attention.qkv.bias = (
            nn.Parameter(one[rows]) for one in (attention.qkv.weight, attention.qkv.bias)
        )
        attention.proj.weight = nn.Parameter(attention.proj.weight[:, KEPT])
        if version == 1:
            table = attention.relative_position_bias_table
            attention.relative_position_bias_table = nn.Parameter(table[:, heads])
        else:
            attention.cpb_mlp[2].weight = nn.Parameter(attention.cpb_mlp[2].weight[heads])
            attention.logit_scale = nn.Parameter(attention.logit_scale[heads])
        original[0].proj.weight.view(FEATURES, HEADS, 8)[:, [1, 3]] = 0
        torch.testing.assert_close(attention(x), original[0](x), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("block", ["SwinTransformerBlock", "SwinTransformerBlockV2"])
def test_a_model_keeps_its_names_and_results(block: str) -> None:
    from torchvision.models import swin_transformer

    kind = getattr(swin_transformer, block)
    merging = swin_transformer.PatchMergingV2 if block.endswith("V2") else swin_transformer.PatchMerging
    original = swin_transformer.SwinTransformer(
        [4, 4], 16, [2, 2], [2, 4], [4, 4], num_classes=5, block=kind, downsample_layer=merging
    )
    original = enlarge(original).eval()
    same, images = swapped(original), torch.randn(2, 3, 40, 48)
    assert same.state_dict().keys() == original.state_dict().keys()
    called: list[str] = []
    for name, part in same.named_modules():
        if name.endswith(("attn.qkv", "attn.proj")):
            part.register_forward_hook(lambda *_, name=name: called.append(name))
    with torch.no_grad():
        torch.testing.assert_close(same(images), original(images), rtol=1e-5, atol=1e-5)
    assert len(called) == 8
