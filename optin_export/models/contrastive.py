"""CLIP and SigLIP: one of the two towers with its projection, and a class layer computed by the text tower.

Radford et al., 2021, section 3.1: a class is the L2-normalised mean of the normalised embeddings of its prompts; a
logit is the scaled cosine of image and class. SigLIP (Zhai et al., 2023) adds a bias.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn
from torch.nn import functional as F

from optin_export.errors import InputError
from optin_export.recipe import ModelSection
from optin_export.workdir.files import MAX_TEXT, read_text

PROMPT = "a photo of a {}."
#: Which tower a task needs.
SIDES: dict[str, Literal["image", "text"]] = {
    "feature-extraction": "text",
    "image-feature-extraction": "image",
    "zero-shot-image-classification": "image",
}
_MODELS = ("CLIPModel", "SiglipModel", "Siglip2Model")
_TEXTS_AT_ONCE = 64


class ImageTower(nn.Module):
    """forward(pixel_values [batch, channels, H, W]) -> image embedding [batch, dim], or logits [batch, classes]."""

    def __init__(self, model: Any, classes: int | None) -> None:
        super().__init__()
        self.config = model.config.vision_config
        self.tower = model.vision_model
        projection = getattr(model, "visual_projection", None)
        self.projection = nn.Identity() if projection is None else projection
        width = self.config.hidden_size if projection is None else projection.out_features
        self.head = None if classes is None else nn.Linear(width, classes, bias=hasattr(model, "logit_bias"))

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        embedding = self.projection(self.tower(pixel_values=pixel_values).pooler_output)
        return embedding if self.head is None else self.head(F.normalize(embedding, dim=-1))


class TextTower(nn.Module):
    """forward(input_ids, attention_mask; int64 [batch, sequence]) -> text embedding [batch, dim].

    pad: the padding token of a tower that was trained on texts padded to one length and reads the last position
    (SigLIP): it receives no mask and does its own padding, so that the embedding does not depend on the batch. None for
    a tower that reads its end token (CLIP).
    """

    def __init__(self, model: Any, pad: int | None) -> None:
        super().__init__()
        self.config = model.config.text_config
        self.tower = model.text_model
        self.projection = getattr(model, "text_projection", nn.Identity())
        self.pad = pad

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None) -> torch.Tensor:
        if self.pad is not None:
            missing = self.config.max_position_embeddings - input_ids.shape[1]
            input_ids, attention_mask = F.pad(input_ids, (0, missing), value=self.pad), None
        return self.projection(self.tower(input_ids=input_ids, attention_mask=attention_mask).pooler_output)


Tower = ImageTower | TextTower


def is_contrastive(module: nn.Module) -> bool:
    """Whether a model of transformers has an image and a text tower; those of other names are compared by value."""
    towers = ("vision_model", "text_model", "get_image_features", "get_text_features")
    known, theirs = type(module).__name__ in _MODELS, type(module).__module__.startswith("transformers.")
    return known or (theirs and all(hasattr(module, name) for name in towers))


def take_tower(
    model: nn.Module, section: ModelSection, tokenizer: Callable[[], Any], classify: bool = True
) -> tuple[Tower, dict[str, Any], dict[str, int]]:
    """The tower that the task needs; its description, from which `build_tower` rebuilds it; class names with indices.

    classify: whether to compute the classes' embeddings, which requires the weights. Raises InputError for a tower that
    outputs no embedding, or unusable class names.
    """
    name, side = type(model).__name__, SIDES.get(section.task)
    if side is None:
        raise InputError(f"a {name} has no output for {section.task}", "it has two towers", f"use {', '.join(SIDES)}")
    if section.pooling is not None:
        raise InputError(
            f"model.pooling does not apply to a {name}", "its towers have their own pooling", "leave model.pooling out"
        )
    if side == "text":
        pad = int(tokenizer().pad_token_id) if name.startswith("Siglip") else None
        if name not in _MODELS and classify:
            _compare(model, TextTower(model, pad))
        return TextTower(model, pad), {"side": side, "pad": pad}, {}
    if name == "Siglip2Model" or not getattr(model.vision_model, "use_head", True):
        raise InputError(
            f"the image tower of this {name} cannot be used",
            "it takes image patches of any shape" if name == "Siglip2Model" else "it has no pooling head",
            "use a CLIP or SigLIP checkpoint of a fixed image size",
        )
    if name not in _MODELS and classify:
        _compare(model, ImageTower(model, None))
    if section.task != "zero-shot-image-classification":
        return ImageTower(model, None), {"side": side, "classes": None}, {}
    classes = _class_names(section)
    tower = ImageTower(model, len(classes))
    reader = tokenizer()
    if name not in _MODELS and classify:
        _compare(model, TextTower(model, None))
    if classify:
        _bake(model, tower, reader, classes, _prompts(section))
    return tower, {"side": side, "classes": list(classes)}, {label: index for index, label in enumerate(classes)}


@torch.no_grad()
def _compare(model: Any, tower: Tower) -> None:
    """Raises InputError unless the tower computes the features that the model's own library computes."""
    generator, config, why = torch.Generator().manual_seed(0), tower.config, "its features are computed in another way"
    try:
        if isinstance(tower, ImageTower):
            image = torch.randn(2, config.num_channels, *[config.image_size] * 2, generator=generator)
            found, wanted = tower(image), model.get_image_features(pixel_values=image)
        else:
            ids = torch.randint(4, config.vocab_size, (2, 8), generator=generator)
            mask = torch.ones_like(ids)
            found, wanted = tower(ids, mask), model.get_text_features(input_ids=ids, attention_mask=mask)
        wanted = wanted if isinstance(wanted, torch.Tensor) else wanted.pooler_output
        if found.shape == wanted.shape and torch.allclose(found, wanted, atol=1e-5 * float(wanted.abs().max())):
            return
    except Exception as error:  # a library's code on a tower of another kind may raise anything
        why = f"it does not run alone ({type(error).__name__})"
    side = "image" if isinstance(tower, ImageTower) else "text"
    raise InputError(
        f"the {side} tower of this {type(model).__name__} cannot be used", why, "use a CLIP or SigLIP model"
    )


def build_tower(model: nn.Module, description: dict[str, Any]) -> Tower:
    """The tower of a model with random weights, as `take_tower` described it."""
    if description["side"] == "text":
        return TextTower(model, description["pad"])
    classes = description["classes"]
    return ImageTower(model, None if classes is None else len(classes))


def _prompts(section: ModelSection) -> Sequence[str]:
    prompt = PROMPT if section.prompt is None else section.prompt
    return (prompt,) if isinstance(prompt, str) else prompt


def _class_names(section: ModelSection) -> Sequence[str]:
    if not isinstance(section.classes, str):
        assert section.classes is not None  # see the recipe's schema
        return section.classes
    try:
        lines = read_text(Path(section.classes), MAX_TEXT).splitlines()
    except (OSError, ValueError) as error:
        raise InputError(
            f"cannot read the class names {section.classes}", str(error), "correct model.classes"
        ) from None
    names = [line.strip() for line in lines if line.strip()]
    twice = next((name for name in names if names.count(name) > 1), None)
    if not names or twice is not None:
        raise InputError(
            f"cannot use the class names {section.classes}",
            "the file has none" if twice is None else f"'{twice}' is there twice",
            "give one name per line",
        )
    return names


@torch.no_grad()
def _bake(model: Any, tower: ImageTower, tokenizer: Any, classes: Sequence[str], prompts: Sequence[str]) -> None:
    """Fill the tower's head: rows are scaled class embeddings."""
    text = TextTower(model, int(tokenizer.pad_token_id) if hasattr(model, "logit_bias") else None).eval()
    length = text.config.max_position_embeddings
    total = torch.zeros(())
    for prompt in prompts:
        texts = [prompt.replace("{}", name) for name in classes]
        parts = []
        for start in range(0, len(texts), _TEXTS_AT_ONCE):
            encoded = tokenizer(
                texts[start : start + _TEXTS_AT_ONCE],
                padding="max_length",
                max_length=length,
                truncation=True,
                return_tensors="pt",
            )
            mask = encoded.get("attention_mask")
            parts.append(F.normalize(text.float()(encoded["input_ids"], mask), dim=-1))
        total = total + torch.cat(parts)
    assert tower.head is not None
    tower.head.weight.copy_(model.logit_scale.exp() * F.normalize(total, dim=-1))
    if tower.head.bias is not None:
        tower.head.bias.copy_(model.logit_bias.expand(len(classes)))
