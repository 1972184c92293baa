"""What a model's description may ask for is bounded before anything of it is built."""

from __future__ import annotations

from typing import Any

import pytest

from optin_export.errors import InputError
from optin_export.models.guard import refuse_endless


@pytest.mark.parametrize(
    "config",
    [
        {"num_hidden_layers": 10**6},
        {"text_config": {"n_layer": 10**6}},
        {"depths": [2, 2, 10**7]},
        {"num_decoder_layers": 10**5},
        {"encoder_layers": 10**400},
        {"depth": -(10**6)},
    ],
)
def test_more_layers_than_any_model_has(config: dict[str, Any]) -> None:
    with pytest.raises(InputError, match="in its configuration is more than"):
        refuse_endless(config, "x")


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"num_hidden_layers": 48, "vocab_size": 10**6, "max_position_embeddings": 131072},
        {"depths": [3, 3, 27, 3], "image_size": 100_000},
        {"layers": "many", "num_layers": None, "vision_config": {"num_hidden_layers": 10_000}},
        {"initializer_range": 0.02, "layer_norm_eps": 1e-12, "layerdrop": 0.0},
    ],
)
def test_configurations_of_models(config: dict[str, Any]) -> None:
    refuse_endless(config, "x")
