"""Attentions that take sizes from their input follow their weights: with a head cut they compute the masked result."""

from __future__ import annotations

import copy
import importlib
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from optin_export.models.equivalents import follow_weights, use_equivalents
from optin_export.models.equivalents.following import FOLLOWING, UNCACHED
from tests.conftest import enlarge

HEADS, WIDTH = 4, 8
KEPT = [0, 2]

#: class: (its arguments, its inputs, {layer with a head's rows: how many blocks of all heads follow one another}).
TOKENS = (torch.randn(2, 16, 32, generator=torch.Generator().manual_seed(1)),)
IMAGE = (TOKENS[0].transpose(1, 2).reshape(2, 32, 4, 4),)
PLAIN: tuple[Any, ...] = ({"dim": 32, "num_heads": HEADS}, TOKENS, {"qkv": 3})
Case = tuple[dict[str, Any], tuple[Any, ...], dict[str, int]]
CASES: dict[str, Case] = {
    "timm.models.cait.ClassAttn": (*PLAIN[:2], {"q": 1, "k": 1, "v": 1}),
    "timm.models.convit.GPSA": (*PLAIN[:2], {"qk": 2, "v": 1}),
    "timm.models.convit.MHSA": PLAIN,
    "timm.models.davit.ChannelAttention": PLAIN,
    "timm.models.davit.ChannelAttentionV2": PLAIN,
    "timm.models.davit.WindowAttention": ({**PLAIN[0], "window_size": (4, 4)}, TOKENS, {"qkv": 3}),
    "timm.models.edgenext.CrossCovarianceAttn": PLAIN,
    "timm.models.fastvit.Attention": ({"dim": 32, "head_dim": WIDTH}, IMAGE, {"qkv": 3}),
    "timm.models.gcvit.WindowAttentionGlobal": (
        {**PLAIN[0], "window_size": (4, 4), "use_global": False},
        TOKENS,
        {"qkv": 3},
    ),
    "timm.models.metaformer.Attention": ({"dim": 32, "head_dim": WIDTH}, TOKENS, {"qkv": 3}),
    "timm.models.nest.Attention": (PLAIN[0], (TOKENS[0][:, None],), {"qkv": 3}),
    "timm.models.nextvit.EfficientAttention": (
        {"dim": 32, "head_dim": WIDTH, "sr_ratio": 2},
        TOKENS,
        {"q": 1, "k": 1, "v": 1},
    ),
    "timm.models.pvt_v2.Attention": ({**PLAIN[0], "sr_ratio": 2}, (*TOKENS, [4, 4]), {"q": 1, "kv": 2}),
    "timm.models.swin_transformer_v2.WindowAttention": ({**PLAIN[0], "window_size": (4, 4)}, TOKENS, {"qkv": 3}),
    "timm.models.swin_transformer_v2_cr.WindowMultiHeadAttention": (
        {**PLAIN[0], "window_size": (4, 4)},
        TOKENS,
        {"qkv": 3},
    ),
    "timm.models.twins.GlobalSubSampleAttn": ({**PLAIN[0], "sr_ratio": 2}, (*TOKENS, (4, 4)), {"q": 1, "kv": 2}),
    "timm.models.twins.LocallyGroupedAttn": ({**PLAIN[0], "ws": 3}, (*TOKENS, (4, 4)), {"qkv": 3}),
    "timm.models.vision_transformer_relpos.RelPosAttention": (PLAIN[0], TOKENS, {"qkv": 3}),
    "timm.models.volo.Attention": (PLAIN[0], (TOKENS[0].reshape(2, 4, 4, 32),), {"qkv": 3}),
    "timm.models.xcit.ClassAttn": (*PLAIN[:2], {"q": 1, "k": 1, "v": 1}),
    "timm.models.xcit.XCA": PLAIN,
    "torchvision.models.maxvit.RelativePositionalMultiHeadAttention": (
        {"feat_dim": 32, "head_dim": WIDTH, "max_seq_len": 16},
        (TOKENS[0][:, None],),
        {"to_qkv": 3},
    ),
}
#: Tables and scales of the heads: parameter and its axis. Heads of Swin V2 are rows of the last layer as well.
BY_HEAD = {
    "gating_param": 0,
    "logit_scale": 0,
    "temperature": 0,
    "relative_position_bias_table": 1,
    "rel_pos.relative_position_bias_table": 1,
    "cpb_mlp.2.weight": 0,
    "meta_mlp.fc2.weight": 0,
    "meta_mlp.fc2.bias": 0,
    "pos_proj.weight": 0,
    "pos_proj.bias": 0,
}


def made(name: str) -> Any:
    """An attention with random weights in a parent, as it is after a model is loaded."""
    module, _, cls = name.rpartition(".")
    torch.manual_seed(0)
    attention = enlarge(getattr(importlib.import_module(module), cls)(**CASES[name][0])).eval()
    for part in attention.modules():
        if "fused_attn" in vars(part):
            part.fused_attn = False
    return nn.ModuleList([attention])


def cut(attention: Any, blocks: dict[str, int]) -> None:
    """Remove all heads but KEPT: rows of the first layers, columns of the last, entries of the tables."""
    columns = torch.cat([torch.arange(WIDTH) + WIDTH * head for head in KEPT])
    if type(attention).__module__ == "timm.models.nest":
        columns = (torch.arange(WIDTH)[:, None] * HEADS + torch.tensor(KEPT)).flatten()
    rows = torch.cat([torch.arange(WIDTH) + WIDTH * head for head in KEPT])
    for name, count in blocks.items():
        layer = attention.get_submodule(name)
        keep = torch.cat([rows + 32 * block for block in range(count)])
        layer.weight = nn.Parameter(layer.weight[keep])
        if layer.bias is not None:
            layer.bias = nn.Parameter(layer.bias[keep])
    last = last_of(attention)
    last.weight = nn.Parameter(last.weight[:, columns])
    for name, parameter in list(attention.named_parameters()):
        if name in BY_HEAD:
            path, _, leaf = name.rpartition(".")
            kept = parameter.detach().index_select(BY_HEAD[name], torch.tensor(KEPT))
            setattr(attention.get_submodule(path), leaf, nn.Parameter(kept))
    for part in attention.modules():
        for name in ("num_heads", "n_heads", "groups"):
            if isinstance(vars(part).get(name), int) and not isinstance(part, nn.Conv2d):
                setattr(part, name, len(KEPT))


def last_of(attention: Any) -> Any:
    return attention.merge if hasattr(attention, "merge") else attention.proj


def mask(attention: Any) -> None:
    """Zero the columns of the removed heads."""
    weight = last_of(attention).weight
    removed = [head for head in range(HEADS) if head not in KEPT]
    with torch.no_grad():
        if type(attention).__module__ == "timm.models.nest":
            weight.view(32, WIDTH, HEADS)[:, :, removed] = 0
        else:
            weight.view(32, HEADS, WIDTH)[:, removed] = 0


def test_every_class_is_tested() -> None:
    assert sorted(CASES) == sorted((*FOLLOWING, "timm.models.twins.GlobalSubSampleAttn"))


@pytest.mark.parametrize("name", sorted(CASES))
def test_a_head_that_is_cut_equals_one_that_is_masked(name: str) -> None:
    _, inputs, blocks = CASES[name]
    parent = made(name)
    with torch.no_grad():
        original = parent[0](*inputs)
        kind = type(parent[0]).__name__
        use_equivalents(parent)
        assert type(parent[0]).__name__ == kind
        torch.testing.assert_close(parent[0](*inputs), original, rtol=1e-5, atol=1e-6)
        dense = copy.deepcopy(parent[0])
        cut(dense, blocks)
        mask(parent[0])
        masked = parent[0](*inputs)
        torch.testing.assert_close(dense(*inputs), masked, rtol=1e-5, atol=1e-6)
        assert not torch.allclose(masked, original, atol=1e-3)


@pytest.mark.parametrize("name", ["timm.models.metaformer.Attention", "timm.models.pvt_v2.Attention"])
def test_without_it_a_head_cannot_be_cut(name: str) -> None:
    attention = made(name)[0]
    cut(attention, CASES[name][2])
    with pytest.raises(RuntimeError, match="shape"):
        attention(*CASES[name][1])


def test_the_changed_attention_is_copied_and_pickled() -> None:
    parent = made("timm.models.metaformer.Attention")
    use_equivalents(parent)
    use_equivalents(parent)
    assert len(type(parent[0]).__mro__) == len(nn.Module.__mro__) + 2
    cut(parent[0], {"qkv": 3})
    inputs = CASES["timm.models.metaformer.Attention"][1]
    for other in (copy.deepcopy(parent), pickle.loads(pickle.dumps(parent))):
        assert type(other[0]) is type(parent[0])
        torch.testing.assert_close(other[0](*inputs), parent[0](*inputs), rtol=0, atol=0)


class OwnAttention(nn.Module):
    """As many write it: sizes from the input, in one argument, with torch.reshape, of a subset of the axes."""

    def __init__(self, reshape: Callable[..., torch.Tensor]) -> None:
        super().__init__()
        self.num_heads, self.reshape = HEADS, reshape
        self.qkv, self.proj = nn.Linear(32, 96), nn.Linear(32, 32)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, tokens, width = x.shape
        qkv = self.reshape(self.qkv(x), (batch, tokens, 3, self.num_heads, width // self.num_heads))
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        x = (q @ k.transpose(-2, -1)).softmax(dim=-1) @ v
        return self.proj(self.reshape(x.transpose(1, 2).contiguous(), (batch, tokens, width)).view(torch.float32))


@pytest.mark.parametrize(
    "reshape", [torch.reshape, torch.Tensor.view, lambda x, sizes: x.reshape(*sizes), lambda x, sizes: x.view(sizes)]
)
def test_an_attention_of_a_user_follows(reshape: Callable[..., torch.Tensor]) -> None:
    original = enlarge(OwnAttention(reshape))
    followed = copy.deepcopy(original)
    follow_weights(followed)
    with torch.no_grad():
        torch.testing.assert_close(followed(*TOKENS), original(*TOKENS), rtol=0, atol=0)
        cut(followed, {"qkv": 3})
        mask(original)
        torch.testing.assert_close(followed(*TOKENS), original(*TOKENS), rtol=1e-5, atol=1e-6)


def test_it_is_exported_with_a_batch_and_a_length_that_vary() -> None:
    parent = made("timm.models.metaformer.Attention")
    use_equivalents(parent)
    cut(parent[0], {"qkv": 3})
    axes = ({0: torch.export.Dim("batch", min=1, max=9), 1: torch.export.Dim("tokens", min=2, max=32)},)
    program = torch.export.export(parent[0], TOKENS, dynamic_shapes=axes).module()
    for shape in ((1, 7, 32), (5, 20, 32)):
        x = torch.randn(shape)
        torch.testing.assert_close(program(x), parent[0](x), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", UNCACHED)
def test_position_biases_are_read_at_every_pass(name: str) -> None:
    module, _, cls = name.rpartition(".")
    args: dict[str, Any] = {"dim": 32, "num_heads": HEADS, "resolution": (4, 4), "key_dim": WIDTH}
    if cls in ("AttentionDownsample", "Attention2dDownsample"):
        args |= {"in_dim": 32, "out_dim": 32} if "levit" in name else {}
        args.pop("dim") if "levit" in name else None
    if "efficientvit" in name:
        args["resolution"] = 4
    attention = getattr(importlib.import_module(module), cls)(**args)
    attention.eval()  # theirs does not return the module
    biases = attention.get_attention_biases(torch.device("cpu"))
    parent = nn.ModuleList([attention])
    use_equivalents(parent)
    adapted: Any = parent[0]
    assert torch.equal(adapted.get_attention_biases(torch.device("cpu")), biases)
    adapted.attention_biases = nn.Parameter(adapted.attention_biases[:2] + 1)
    assert torch.equal(adapted.get_attention_biases(torch.device("cpu")), biases[:2] + 1)
