"""MODELS: one small random model of every architecture the families know, and inputs for it."""

from __future__ import annotations

import importlib
import pkgutil
from pathlib import Path

import numpy as np
import torch
from torch import nn

import tests.units
from optin_export.data import Batch
from optin_export.models import build
from optin_export.models.tasks import ImageModel, TaskModel
from tests.conftest import ROOT, VIT_ARGS, enlarge
from tests.units.builders import (
    CLASSES,
    EMBEDDING,
    IMAGE,
    IMAGES,
    RESNET,
    TEXT,
    Architecture,
    Models,
    Units,
    from_python,
    from_timm,
    from_transformers,
)

CONVOLUTIONAL = {"resnet", "vgg"}
CONVNETS = Path(__file__).parent / "convnets.py"
MODELS: Models = {
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

#: Units of the models that are not three plain blocks of heads and neurons.
UNITS: Units = {}
#: Families with a ReLU behind some units.
RECTIFIED: set[str] = set()
# More models in modules models_*.py beside this one, each with MODELS, UNITS and perhaps CONVOLUTIONAL and RECTIFIED.
for _module in pkgutil.iter_modules(tests.units.__path__):
    if _module.name.startswith("models_"):
        _more = importlib.import_module(f"tests.units.{_module.name}")
        MODELS |= _more.MODELS
        UNITS |= _more.UNITS
        CONVOLUTIONAL |= getattr(_more, "CONVOLUTIONAL", set())
        RECTIFIED |= getattr(_more, "RECTIFIED", set())


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
    inputs = {"input_ids": torch.where(mask.bool(), tokens, 1), "attention_mask": mask}
    return inputs if model.reads_mask else {"input_ids": inputs["input_ids"]}


def batches_for(model: TaskModel, count: int, size: int = 6, first_seed: int = 1) -> list[Batch]:
    return [Batch(inputs_for(model, size, first_seed + index), np.arange(size)) for index in range(count)]
