"""What mixes all heads is named in the reason why they stay."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from optin_export.pruning.mixing import module_that_mixes
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


@pytest.mark.parametrize("kind", forwards.FORWARDS)
def test_no_module_is_named_where_none_mixes(kind: str) -> None:
    made = forwards.model(kind)
    for group in structure_of(made).groups:
        assert module_that_mixes(made, group, forwards.inputs()) is None


def test_heads_with_norms_of_their_own_go() -> None:
    structure = structure_of(model(forwards.HEAD))
    assert not structure.refused
    assert [group.count for group in structure.groups if group.kind == "heads"] == [forwards.HEADS] * 2
