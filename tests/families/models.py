"""MODELS: one small random model of every architecture the families know, and inputs for it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from optin_export.sources import Batch, build
from optin_export.sources.tasks import ImageModel, TaskModel
from tests.conftest import ROOT, VIT_ARGS, enlarge

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

        settings = getattr(transformers, name).config_class(**SMALL, **config, attn_implementation="eager")
        return {"library": "transformers", "class": name, "config": settings.to_dict()}

    return make


def from_timm(name: str, **args: Any) -> Callable[[], Architecture]:
    return lambda: {"library": "timm", "name": name, "args": args}


def from_python(path: Path, function: str, **args: Any) -> Callable[[], Architecture]:
    return lambda: {"library": "python", "source": f"py:{path}:{function}", "args": args}


CONVOLUTIONAL = {"resnet", "vgg"}
CONVNETS = Path(__file__).parent / "convnets.py"
CLASSES, EMBEDDING, IMAGES = "text-classification", "feature-extraction", "image-classification"
#: name -> family, task, what `optin_export.sources.build` makes it from.
MODELS: dict[str, tuple[str, str, Callable[[], Architecture]]] = {
    "bert": ("bert", CLASSES, from_transformers("BertForSequenceClassification", **TEXT)),
    "bert-embedding": ("bert", EMBEDDING, from_transformers("BertModel", **TEXT)),
    "bert-regression": ("bert", CLASSES, from_transformers("BertForSequenceClassification", **TEXT, num_labels=1)),
    "roberta": ("bert", CLASSES, from_transformers("RobertaForSequenceClassification", **TEXT)),
    "electra": ("bert", CLASSES, from_transformers("ElectraForSequenceClassification", **TEXT, embedding_size=32)),
    "vit": ("vit", IMAGES, from_timm("vit_tiny_patch16_224", **VIT_ARGS)),
    "vit-no-qkv-bias": ("vit", IMAGES, from_timm("vit_tiny_patch16_224", **VIT_ARGS, qkv_bias=False)),
    "vit-qk-norm": ("vit", IMAGES, from_timm("vit_tiny_patch16_224", **VIT_ARGS, qk_norm=True)),
    "deit3-layer-scale": ("vit", IMAGES, from_timm("deit3_small_patch16_224", **VIT_ARGS, init_values=0.1)),
    "deit-distilled": ("vit", IMAGES, from_timm("deit_tiny_distilled_patch16_224", **VIT_ARGS)),
    "vit-transformers": ("vit-transformers", IMAGES, from_transformers("ViTForImageClassification", **IMAGE)),
    "deit-transformers": ("vit-transformers", IMAGES, from_transformers("DeiTForImageClassification", **IMAGE)),
    "resnet-timm": ("resnet", IMAGES, from_timm("resnet18", **RESNET)),
    "resnet-timm-bottleneck": ("resnet", IMAGES, from_timm("resnet26", **RESNET)),
    "resnet-torchvision": ("resnet", IMAGES, from_python(CONVNETS, "basic_resnet")),
    "resnet-cifar": (
        "resnet",
        IMAGES,
        from_python(ROOT / "recipes" / "cifar_resnet" / "resnet.py", "resnet", depth=8, classes=5),
    ),
    "vgg-bn": ("vgg", IMAGES, from_python(CONVNETS, "vgg")),
    "vgg": ("vgg", IMAGES, from_python(CONVNETS, "vgg", batch_norm=False)),
}


def small_model(name: str, seed: int = 0) -> tuple[TaskModel, Architecture]:
    """A model of MODELS with weights under which every unit matters, and the architecture it is rebuilt from."""
    family, task, make = MODELS[name]
    pooling = "mean" if task == EMBEDDING else None
    architecture = {**make(), "task": task, "pooling": pooling, "normalize": False}
    model = build(architecture, trust_python=True)
    enlarge(model, seed)
    if family in CONVOLUTIONAL:
        _train_norms(model, seed)
    return model, architecture


def _train_norms(model: TaskModel, seed: int) -> None:
    """What training makes of a convolutional network: batch norms that norm (timm starts a block's last one at zero),
    and filters that look for differences. With random ones half of the channels are dead."""
    generator = torch.Generator().manual_seed(seed)
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                module.weight.sub_(module.weight.flatten(1).mean(1).view(-1, *[1] * (module.weight.dim() - 1)))
        for norm in norms:
            norm.weight.copy_(0.5 + torch.rand(norm.weight.shape, generator=generator))
            norm.momentum = None  # the plain mean over all batches
            norm.train()
        for batch in range(2):
            model(**inputs_for(model, 16, 1000 + batch))
        for norm in norms:
            norm.momentum = 0.1
            norm.eval()


def inputs_for(model: TaskModel, batch: int, seed: int) -> dict[str, torch.Tensor]:
    """Random images, or sentences of different lengths padded to 12 tokens."""
    generator = torch.Generator().manual_seed(seed)
    if isinstance(model, ImageModel):
        first = next(module for module in model.modules() if isinstance(module, nn.Conv2d))
        return {"pixel_values": torch.randn(batch, first.in_channels, 32, 32, generator=generator)}
    lengths = torch.randint(6, 13, (batch,), generator=generator)
    lengths[0] = 12
    mask = (torch.arange(12)[None] < lengths[:, None]).long()
    tokens = torch.randint(5, 64, (batch, 12), generator=generator)
    return {"input_ids": torch.where(mask.bool(), tokens, 1), "attention_mask": mask}


def batches_for(model: TaskModel, count: int, size: int = 6, first_seed: int = 1) -> list[Batch]:
    return [Batch(inputs_for(model, size, first_seed + index), np.arange(size)) for index in range(count)]
