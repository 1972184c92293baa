"""Classifiers of transformers that read the last end token of a text (BART, T5 and their like), in a form that exports.

The library selects that token by a mask, which fixes the batch size in an exported graph.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn


def reads_end_token(model: nn.Module) -> bool:
    """Whether this is an encoder-decoder of transformers that classifies the decoder's state at the last end token."""
    ours = type(model).__module__.startswith("transformers.models.")
    encodes = getattr(getattr(model, "config", None), "is_encoder_decoder", False)
    return ours and bool(encodes) and _body(model) is not None and hasattr(model, "classification_head")


def logits_at_end_token(model: Any, input_ids: torch.Tensor, attention_mask: torch.Tensor | None) -> torch.Tensor:
    """What `model` returns as logits, [batch, classes].

    Raises ValueError for a text without an end token.
    """
    body, given = _body(model), {"attention_mask": attention_mask, "use_cache": False}
    if hasattr(model, "_shift_right"):  # T5 computes the decoder's input outside of its body
        given["decoder_input_ids"] = model._shift_right(input_ids)
    states = body(input_ids, **given)[0]
    ends = input_ids == model.config.eos_token_id
    if not torch.compiler.is_compiling() and not ends.any(1).all():
        raise ValueError(f"a text has no end token (number {model.config.eos_token_id}), which this model reads")
    last = torch.where(ends, torch.arange(input_ids.shape[1], device=ends.device), 0).amax(1)
    index = last[:, None, None].expand(-1, 1, states.shape[-1])
    logits: torch.Tensor = model.classification_head(states.gather(1, index)[:, 0])
    return logits


def _body(model: Any) -> Any:
    return getattr(model, "model", None) or getattr(model, "transformer", None)
