"""Embeddings of transformers' image models: what their library pools, or a row per token or position."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import nn

from optin_export.errors import InputError

#: Height and width of the image that is tried, for a configuration without one.
USUAL_SIZE = 224
Layout = Literal["vector", "tokens", "map"]


def embedding_layout(module: Any) -> Layout:
    """The layout of the embedding: of one pass over an image of zeros.

    Raises InputError for a model that does not run on an image alone, or gives neither a pooled output nor states.
    """
    config = module.config
    size = getattr(config, "image_size", None) or USUAL_SIZE
    height, width = (size, size) if isinstance(size, int) else tuple(size)[-2:]
    image = torch.zeros(1, getattr(config, "num_channels", None) or 3, height, width)
    try:
        with torch.no_grad():
            output = module.float().eval()(pixel_values=image)
        if output.get("pooler_output") is not None:
            return "vector"
        layouts: dict[int, Layout] = {3: "tokens", 4: "map"}
        return layouts[output["last_hidden_state"].dim()]
    except Exception as error:  # a library's code on a model that takes more than an image may raise anything
        raise InputError(
            f"a {type(module).__name__} cannot be used for image-feature-extraction",
            f"it gives no embedding of an image alone ({type(error).__name__})",
            "use a model of AutoModel with pooler_output or last_hidden_state, or a timm model",
        ) from error


def embedding(output: Any, layout: str) -> torch.Tensor:
    """The pooled output [batch, features], or the last hidden states [batch, ...]."""
    found: torch.Tensor = output.pooler_output.flatten(1) if layout == "vector" else output.last_hidden_state
    return found


def drop_pooler(module: nn.Module) -> None:
    """Remove a pooler that has no trained weights."""
    if getattr(module, "pooler", None) is not None:
        module.register_module("pooler", None)
