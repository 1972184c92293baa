"""The size of a model from its files: headers of safetensors are read, tensors are not."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from optin_export.recipe import Recipe
from optin_export.workdir.files import regular


@dataclass(frozen=True)
class Size:
    """How large a model is.

    parameters: number of values in the checkpoint. macs: a lower bound for one sample, from the dense layers at every
    token; None if the layers do not determine it (convolutions). origin: the files that were read.
    """

    parameters: int
    macs: int | None
    origin: str


def size_of(recipe: Recipe) -> Size | None:
    """The size of the recipe's model; None if its weights are neither on this machine nor random."""
    if recipe.model.weights == "random":
        return _counted(recipe)
    files = _files(recipe)
    shapes: list[tuple[str, tuple[int, ...]]] = []
    for path in files:
        if path.suffix != ".safetensors":
            # A pickle: loading it would run its code. Nearly all of the file is float32 numbers.
            return Size(path.stat().st_size // 4, None, f"size of {path.name}")
        try:
            with safe_open(regular(path), "np") as file:
                shapes += [(name, tuple(file.get_slice(name).get_shape())) for name in file.keys()]  # noqa: SIM118
        except (OSError, SafetensorError):
            return None
    if not shapes:
        return None
    parameters = sum(math.prod(shape) for _, shape in shapes)
    return Size(parameters, _macs(recipe, shapes), f"header of {files[0].name}")


def _files(recipe: Recipe) -> list[Path]:
    model = recipe.model
    if model.weights != "pretrained":
        path, entry = Path(model.weights), model.weights.rpartition("#")[0]
        if entry and not path.exists():
            path = Path(entry)
        if path.name.endswith(".index.json"):
            path = path.parent
        if not path.is_dir():
            return [path] if path.is_file() else []
        whole = path / "model.safetensors"
        return [whole] if whole.is_file() else sorted(path.glob("*-of-*.safetensors"))
    prefix, _, name = model.source.partition(":")
    folder = Path(model.source if model.source.startswith("/") else name)
    if prefix == "hf" and not folder.is_dir():
        from huggingface_hub import try_to_load_from_cache

        try:
            found = try_to_load_from_cache(name, "model.safetensors")
        except ValueError:  # not a hub name
            return []
        return [Path(found)] if isinstance(found, str) else []
    if not folder.is_dir() or prefix not in ("hf", model.source):
        return []
    whole = folder / "model.safetensors"
    return [whole] if whole.is_file() else sorted(folder.glob("model-*.safetensors"))


def _counted(recipe: Recipe) -> Size | None:
    """The parameters of an architecture, built without memory for them; None for a user's own function."""
    model = recipe.model
    prefix, _, name = model.source.partition(":")
    if prefix not in ("hf", "timm"):
        return None
    import torch

    try:
        with torch.device("meta"):
            if prefix == "timm":
                import timm

                module: Any = timm.create_model(name, pretrained=False, **model.args)
            else:
                import transformers

                by_type = name.removeprefix("model_type=")
                if by_type != name:
                    config = transformers.AutoConfig.for_model(by_type, **model.args)
                else:
                    config = transformers.AutoConfig.from_pretrained(name, local_files_only=True, **model.args)
                module = transformers.AutoModel.from_config(config)
        count = sum(tensor.numel() for tensor in module.parameters())
    except Exception:  # an architecture that cannot be built here: loading it says why
        return None
    return Size(count, None, "architecture with random weights") if count else None


def _macs(recipe: Recipe, shapes: list[tuple[str, tuple[int, ...]]]) -> int | None:
    kernels = [shape for _, shape in shapes if len(shape) == 4]
    # Embedding tables are looked up, not multiplied.
    dense = sum(math.prod(shape) for name, shape in shapes if len(shape) == 2 and "embed" not in name.lower())
    if recipe.is_text:
        return dense * recipe.export.sequence
    size = recipe.model.preprocess.size
    if len(kernels) != 1 or size is None:
        return None
    tokens = (size[0] // max(kernels[0][2], 1)) * (size[1] // max(kernels[0][3], 1))
    return (dense + math.prod(kernels[0])) * tokens
