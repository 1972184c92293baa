"""How the small random models of the family tests are described: what `optin_export.models.build` makes them from."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

Architecture = dict[str, Any]
SMALL = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 64}
TEXT = {"vocab_size": 64, "max_position_embeddings": 40}
IMAGE = {"image_size": 32, "patch_size": 8, "num_channels": 1}
#: Stages of 8 to 32 channels behind a narrow stem; the first stage has two blocks, one without a projection.
RESNET = {
    "in_chans": 1,
    "num_classes": 5,
    "channels": [8, 16, 24, 32],
    "layers": [2, 1, 1, 1],
    "stem_type": "deep",
    "stem_width": 4,
}


def from_transformers(name: str, **config: Any) -> Callable[[], Architecture]:
    def make() -> Architecture:
        import transformers

        settings = getattr(transformers, name).config_class(**{**SMALL, **config}, attn_implementation="eager")
        return {"library": "transformers", "class": name, "config": settings.to_dict()}

    return make


def from_timm(name: str, **args: Any) -> Callable[[], Architecture]:
    return lambda: {"library": "timm", "name": name, "args": args}


def from_python(path: Path, function: str, **args: Any) -> Callable[[], Architecture]:
    return lambda: {"library": "python", "source": f"py:{path}:{function}", "args": args}


CLASSES, EMBEDDING, IMAGES = "text-classification", "feature-extraction", "image-classification"
#: name -> family, task, description.
Models = dict[str, tuple[str, str, Callable[[], Architecture]]]
#: Units of a model: group key -> how many, how many inputs of the consumer each of them is.
Units = dict[str, dict[str, tuple[int, int]]]
