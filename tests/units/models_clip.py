"""Towers of CLIP and SigLIP. The same layers stand in both; of a model with two towers one is left."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tests.units.builders import EMBEDDING, IMAGE, IMAGES, SMALL, TEXT, Architecture, Models, Units

ZERO_SHOT, IMAGE_EMBEDDING = "zero-shot-image-classification", "image-feature-extraction"
#: The text tower is wider and shorter than the image tower: one of them taken for the other shows.
TEXT_TOWER = {**SMALL, **TEXT, "hidden_size": 24, "num_hidden_layers": 2}


def two_towers(name: str, tower: dict[str, Any] | None, **config: Any) -> Callable[[], Architecture]:
    def make() -> Architecture:
        import transformers

        settings = getattr(transformers, name).config_class(
            vision_config={**SMALL, **IMAGE}, attn_implementation="eager", **config
        )
        made = {"library": "transformers", "class": name, "config": settings.to_dict()}
        return made if tower is None else {**made, "tower": tower}

    return make


CLIP = {"text_config": {**TEXT_TOWER, "eos_token_id": 2}, "projection_dim": 20}
SIGLIP = {"text_config": {**TEXT_TOWER, "projection_size": 32}}
CLASSES = {"side": "image", "classes": ["ant", "bee", "cat", "dog", "elk"]}
MODELS: Models = {
    "clip-zero-shot": ("clip", ZERO_SHOT, two_towers("CLIPModel", CLASSES, **CLIP)),
    "clip-image": ("clip", IMAGE_EMBEDDING, two_towers("CLIPModel", {"side": "image", "classes": None}, **CLIP)),
    "clip-text": ("clip", EMBEDDING, two_towers("CLIPModel", {"side": "text", "pad": None}, **CLIP)),
    "clip-classifier": ("clip", IMAGES, two_towers("CLIPForImageClassification", None, num_labels=5)),
    "siglip-zero-shot": ("clip", ZERO_SHOT, two_towers("SiglipModel", CLASSES, **SIGLIP)),
    "siglip-text": ("clip", EMBEDDING, two_towers("SiglipModel", {"side": "text", "pad": 1}, **SIGLIP)),
    "siglip2-text": ("clip", EMBEDDING, two_towers("Siglip2Model", {"side": "text", "pad": 0}, **SIGLIP)),
}


def _units(blocks: int, head_dim: int) -> dict[str, tuple[int, int]]:
    sizes = {"heads": (4, head_dim), "neurons": (64, 1)}
    return {f"block{block:02d}.{kind}": size for block in range(blocks) for kind, size in sizes.items()}


UNITS: Units = {name: _units(2, 6) if task == EMBEDDING else _units(3, 8) for name, (_, task, _) in MODELS.items()}
