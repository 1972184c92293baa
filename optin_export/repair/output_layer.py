"""The layer that computes the model's output; refitting it can compensate errors of all blocks."""

from __future__ import annotations

import torch
from torch import nn

from optin_export.models import Inputs, TaskModel
from optin_export.units import capture, get_layer

#: Wider layers are not refitted: the rows of a vocabulary would take gigabytes.
MOST_OUTPUTS = 8192


def output_layer(model: TaskModel, inputs: Inputs) -> str | None:
    """The linear layer that computes the model's output (logits), if there is one and it can be refitted."""
    outputs: dict[str, torch.Tensor] = {}

    def keep(path: str, args: object, output: torch.Tensor) -> None:
        outputs[path] = output

    layers = [path for path, module in model.named_modules() if isinstance(module, nn.Linear)]
    with torch.no_grad(), capture(model, outputs=dict.fromkeys(layers, keep)):
        result = model(**inputs)
    if model.output_layout == "spans":
        result = result.mT  # the layer outputs start and end per token
    same = [path for path, output in outputs.items() if output.shape == result.shape and torch.equal(output, result)]
    usable = same and result.shape[-1] <= MOST_OUTPUTS and not is_tied(model, same[-1])
    return same[-1] if usable else None


def is_tied(model: TaskModel, path: str) -> bool:
    """Whether another module has the same weight: embeddings must not change with the layer that outputs words."""
    weight = get_layer(model, path).weight
    return sum(parameter is weight for _, parameter in model.named_parameters(remove_duplicate=False)) > 1
