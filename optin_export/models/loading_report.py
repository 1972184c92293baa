"""Evaluate transformers' report on a loaded checkpoint: weights that the model did not take, and why."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from optin_export.errors import InputError
from optin_export.models.encoders import has_decoder
from optin_export.models.state_dicts import few, is_extra


def missing_weights(info: Mapping[str, Any], module: nn.Module, task: str) -> list[str]:
    """Names of weights that the checkpoint lacks and that the task's module uses.

    The pooler is not part of a sentence embedding, nor the loss of a segmentation, nor what masks frames in training.
    info: see `unused_weights`.
    """
    unused: tuple[str, ...] = ("pooler.", "criterion.")
    if has_decoder(module, task):
        unused += ("decoder.", "model.decoder.")
    names = (key for key in info.get("missing_keys", ()) if not key.startswith(unused))
    return sorted(key for key in names if not key.endswith("masked_spec_embed") and not _is_computed(module, key))


def _is_computed(module: nn.Module, key: str) -> bool:
    """Whether a weight is a table of sines, which the library computes instead of saving it."""
    parent = dict(module.named_modules()).get(key.rpartition(".")[0])
    return "Sinusoidal" in type(parent).__name__


def unused_weights(info: Mapping[str, Any], module: nn.Module, name: str, task: str) -> list[str]:
    """A note on weights of the checkpoint `name` that `module` does not have: one line or none.

    info: from `from_pretrained(..., output_loading_info=True)`. Raises InputError if the checkpoint has other shapes,
    or more layers than the configuration: the model would differ from the trained one.
    """
    changed = sorted(str(entry[0] if isinstance(entry, tuple) else entry) for entry in info.get("mismatched_keys", ()))
    if changed:
        raise InputError(
            f"the weights of 'hf:{name}' have other shapes than its configuration says",
            f"{len(changed)} differ: {few(changed)}",
            "correct model.args, or the config.json of the folder",
        )
    unused = sorted(key for key in info.get("unexpected_keys", ()) if not is_extra(key))
    deeper = [key for key in unused if _is_beyond(module, key)]
    if deeper:
        raise InputError(
            f"the checkpoint of 'hf:{name}' has more layers than its configuration says",
            f"{len(deeper)} weights would be left out: {few(deeper)}",
            "correct model.args, or the config.json of the folder",
        )
    if not unused:
        return []
    return [
        f"'{name}' has {len(unused)} weights that {task} does not use, such as a head of another task: {few(unused)}"
    ]


def _is_beyond(module: nn.Module, key: str) -> bool:
    """Whether a weight's name leads into a list of layers that ends before it."""
    prefix = getattr(module, "base_model_prefix", "")
    for name in {key, key.removeprefix(f"{prefix}."), f"{prefix}.{key}"}:
        part: Any = module
        for segment in name.split("."):
            inner = part._modules.get(segment) if isinstance(part, nn.Module) else None
            if inner is None:
                if isinstance(part, nn.ModuleList) and segment.isdigit() and len(part):
                    return int(segment) >= len(part)
                break
            part = inner
    return False
