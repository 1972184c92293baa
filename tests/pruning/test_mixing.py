"""What mixes all units is named in the reason why they stay."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from optin_export.models import wrap
from optin_export.pruning import verified
from optin_export.pruning.mixing import module_that_mixes
from optin_export.units import find_structure
from tests.pruning import forwards
from tests.pruning.test_code_sizes import structure_of


class Normed(forwards.Attention):
    """Attention with norms of the queries and keys: across all heads (OLMo 2), or in each head (Qwen 3)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(forwards.WIDTH, forwards.WIDTH) for _ in range(3))
        self.q_norm, self.k_norm = nn.RMSNorm(width), nn.RMSNorm(width)
        self.width, self.qkv = width, None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k = (
            norm(layer(x).unflatten(-1, (-1, self.width))).flatten(2)
            for layer, norm in ((self.q, self.q_norm), (self.k, self.k_norm))
        )
        q, k, v = (one.unflatten(-1, (-1, forwards.HEAD)).transpose(1, 2) for one in (q, k, self.v(x)))
        return self.proj(self.attend(q, k, v).transpose(1, 2).flatten(2))


def model(width: int) -> Any:
    made: Any = forwards.model("InputWidth", "InputWidth")
    torch.manual_seed(1)
    for block in made.blocks:
        block.attention = Normed(width)
    return made.eval().requires_grad_(False)


class AllHeads(Normed):
    """As OLMo 2 is written: the norm reads what the layer makes."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.q_norm(self.q(x)), self.k_norm(self.k(x)), self.v(x)
        q, k, v = (one.unflatten(-1, (-1, forwards.HEAD)).transpose(1, 2) for one in (q, k, v))
        return self.proj(self.attend(q, k, v).transpose(1, 2).flatten(2))


def test_a_norm_across_heads_is_named() -> None:
    made = model(forwards.WIDTH)
    for block in made.blocks:
        block.attention.__class__ = AllHeads
    structure = structure_of(made)
    assert {group.kind for group in structure.groups} == {"neurons"}
    (refusal,) = structure.refused
    assert refusal.kind == "heads"
    assert refusal.error.what.startswith("the heads that 'blocks.0.attention.proj' and 1 layers like it reads cannot")
    assert refusal.error.why == "'blocks.0.attention.q_norm' mixes the features of all of them"


class Gate(nn.Module):
    """As in gMLP: a norm across one half of the features, which scales the other."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.up, self.act, self.norm = nn.Linear(8, 2 * width), nn.GELU(), nn.LayerNorm(width)
        self.down, self.tail = nn.Linear(width, 8), nn.Sequential(nn.Linear(8, 12), nn.ReLU(), nn.Linear(12, 8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        one, other = self.act(self.up(x)).chunk(2, -1)
        x = x + self.down(one * self.norm(other))
        return x + self.tail(x)


def test_a_norm_across_neurons_is_named() -> None:
    torch.manual_seed(0)
    module = nn.Sequential(Gate(16), Gate(16), nn.AvgPool1d(8), nn.Flatten()).eval().requires_grad_(False)
    for parameter in module.parameters():
        parameter.data.normal_(0, 0.3)
    model, inputs = wrap(module, "image-classification"), {"pixel_values": torch.randn(4, 5, 8)}
    structure = verified(model, find_structure(model, inputs=inputs), inputs)
    assert [group.consumer for group in structure.groups] == ["model.0.tail.2", "model.1.tail.2"]
    assert [one.error.why for one in structure.refused] == ["'model.0.norm' mixes the features of all of them"]


def test_a_norm_of_other_features_is_not_named() -> None:
    """As wide as the units, it reads what another layer makes."""
    torch.manual_seed(0)
    parts = nn.ModuleDict({"norm": nn.LayerNorm(8), "up": nn.Linear(8, 8), "act": nn.ReLU(), "down": nn.Linear(8, 4)})

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.parts = nn.Linear(6, 8), parts

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.parts.down(self.parts.act(self.parts.up(self.parts.norm(self.first(x)))))

    model, inputs = (
        wrap(Block().eval().requires_grad_(False), "image-classification"),
        {"pixel_values": torch.randn(4, 6)},
    )
    groups = find_structure(model, inputs=inputs).groups
    (group,) = [one for one in groups if one.consumer == "model.parts.down"]
    assert module_that_mixes(model, group, inputs) is None


@pytest.mark.parametrize("kind", forwards.FORWARDS)
def test_no_module_is_named_where_none_mixes(kind: str) -> None:
    made = forwards.model(kind)
    for group in structure_of(made).groups:
        assert module_that_mixes(made, group, forwards.inputs()) is None


def test_heads_with_norms_of_their_own_go() -> None:
    structure = structure_of(model(forwards.HEAD))
    assert not structure.refused
    assert [group.count for group in structure.groups if group.kind == "heads"] == [forwards.HEADS] * 2
