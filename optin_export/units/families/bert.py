"""BERT and the encoders built from the same layers in transformers (post-norm, separate query, key and value)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from optin_export.units.declare import Family, Producer, Tokens, UnitGroup, class_named


def _groups(block: Any, path: str, index: int) -> tuple[UnitGroup, ...]:
    attention = block.attention.self
    head_dim = attention.attention_head_size
    heads = UnitGroup(
        block=index,
        kind="heads",
        count=attention.num_attention_heads,
        width=head_dim,
        producers=tuple(Producer(f"{path}.attention.self.{name}") for name in ("query", "key", "value")),
        consumer=f"{path}.attention.output.dense",
        residual=(f"{path}.attention.output", 1),
        sizes=(
            (f"{path}.attention.self.num_attention_heads", 1),
            (f"{path}.attention.self.all_head_size", head_dim),
        ),
        sublayer=f"{path}.attention.output.dense",
        bypass=((f"{path}.attention.self", True),),
    )
    neurons = UnitGroup(
        block=index,
        kind="neurons",
        count=block.intermediate.dense.out_features,
        width=1,
        producers=(Producer(f"{path}.intermediate.dense"),),
        consumer=f"{path}.output.dense",
        residual=(f"{path}.output", 1),
        sublayer=f"{path}.output.dense",
        bypass=((f"{path}.intermediate", False),),
    )
    return heads, neurons


def _attend(block: Any, stream: Any, mask: Any) -> Any:
    return block.attention(stream, mask)[0]


def _feed(block: Any, stream: Any) -> Any:
    return block.feed_forward_chunk(stream)


def _tokens(model: nn.Module, found: Sequence[tuple[str, nn.Module]]) -> Tokens:
    return Tokens(1, _attend, _feed, padded=True)


FAMILY = Family(
    name="bert",
    library="transformers",
    examples="BERT, MiniLM (bert), RoBERTa, XLM-R, ELECTRA, CamemBERT",
    units=("heads", "neurons"),
    sublayers=("heads", "neurons"),
    parts=(
        "attention.self.query",
        "attention.self.key",
        "attention.self.value",
        "attention.output.dense",
        "intermediate.dense",
        "output.dense",
    ),
    is_block=class_named("BertLayer", "RobertaLayer", "XLMRobertaLayer", "ElectraLayer", "CamembertLayer"),
    groups=_groups,
    tokens=_tokens,
)
