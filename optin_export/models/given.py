"""Make a task module of a module in memory, by the same steps as for a model that a recipe names."""

from __future__ import annotations

import copy
from typing import Any

from torch import nn

from optin_export.errors import InputError
from optin_export.models.by_type import task_of_class
from optin_export.models.loading import LoadedModel, architecture_of, as_loaded
from optin_export.recipe import ModelSection

#: The name in errors of a model without a source.
GIVEN = "the model"


def load_given(module: nn.Module, section: ModelSection) -> LoadedModel:
    """The task module around a copy of `module`, float32 on the CPU, in eval mode and with eager attention.

    Its `architecture` is that of a transformers model, or timm's name with the number of classes, or has no source;
    `pruning.load_model` finds out what it builds.
    Raises InputError for a module that cannot be copied, or whose weights or class cannot be used.
    """
    return as_loaded(_copied(module), _architecture(module), section.model_copy(update={"source": GIVEN}))


def task_of_module(module: nn.Module, reads_text: bool) -> str:
    """The task by the class of a transformers model, else the task of an image model. reads_text: its data is text.

    Raises InputError if it cannot be determined.
    """
    module = unwrapped(module)
    name, kind = type(module).__name__, getattr(getattr(module, "config", None), "model_type", None)
    found = None if kind is None else task_of_class(kind, name)
    if found == "zero-shot-image-classification":
        raise InputError(
            f"the task of a {name} is not clear",
            "it has two towers, and classes only where they are named",
            "set task='image-feature-extraction' or 'feature-extraction' for one tower, or run a recipe with "
            "model.classes",
        )
    if found is not None:
        return found
    if kind is not None or reads_text:
        raise InputError(
            f"the task of a {name} is not clear",
            "its class is no model class of transformers with a head that is known",
            "set task=..., such as 'text-classification' (docs/reference/recipe.md, model.task)",
        )
    return "image-feature-extraction" if getattr(module, "num_classes", None) == 0 else "image-classification"


def unwrapped(module: nn.Module) -> nn.Module:
    """The module inside torch.compile and data parallel wrappers. Raises InputError for anything but a module."""
    if not isinstance(module, nn.Module):
        raise InputError(
            "the model is no torch module", f"it is a {type(module).__name__}", "give a torch.nn.Module, loaded"
        )
    parallel = isinstance(module, nn.DataParallel | nn.parallel.DistributedDataParallel)
    inner: Any = module.module if parallel else getattr(module, "_orig_mod", None)
    return module if inner is None else unwrapped(inner)


def _copied(module: nn.Module) -> nn.Module:
    try:
        return copy.deepcopy(unwrapped(module))
    except Exception as error:  # modules may contain objects that cannot be copied, such as open files
        raise InputError(
            "the model cannot be copied",
            f"{type(error).__name__}: {error}"[:300],
            "remove what it holds in addition to weights, such as kept activations, files or processes",
        ) from error


def _architecture(module: nn.Module) -> dict[str, Any]:
    import transformers

    module = unwrapped(module)
    if isinstance(module, transformers.PreTrainedModel):
        return architecture_of(module)
    config: Any = getattr(module, "pretrained_cfg", None)
    name = config.get("architecture") if hasattr(config, "get") else None
    if isinstance(name, str):
        return {"library": "timm", "name": name, "args": {"num_classes": getattr(module, "num_classes", None)}}
    return {"library": "python", "source": "", "args": {}}
