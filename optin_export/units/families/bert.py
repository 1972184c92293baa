"""BERT and the encoders built from the same layers in transformers (post-norm, separate query, key and value)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from optin_export.units.declare import Family, Tokens, UnitGroup, class_named
from optin_export.units.inside import Inside


def _groups(block: Any, path: str, index: int) -> tuple[UnitGroup, ...]:
    attention, inside = block.attention.self, Inside(block, path, index)
    heads = inside.heads(
        [f"attention.self.{name}" for name in ("query", "key", "value")],
        "attention.output.dense",
        attention.num_attention_heads,
        residual=("attention.output", 1),
        sizes=(
            ("attention.self.num_attention_heads", 1),
            ("attention.self.all_head_size", attention.attention_head_size),
        ),
        sublayer="attention.output.dense",
        bypass=[("attention.self", True)],
    )
    neurons = inside.neurons(
        ["intermediate.dense"],
        "output.dense",
        residual=("output", 1),
        sublayer="output.dense",
        bypass=[("intermediate", False)],
    )
    return heads, neurons


def _query_keys(block: Any, path: str) -> tuple[str, str, str] | None:
    where = f"{path}.attention.self"
    return None if block.attention.self.is_decoder else (where, f"{where}.query", f"{where}.key")


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
    query_keys=_query_keys,
)
