"""How many rows go through the model at once, so that the graph of a backward pass stays small."""

from __future__ import annotations

import torch

from optin_export.data.batches import Processor, batches
from optin_export.data.readers import Examples
from optin_export.models.tasks import Inputs, TaskModel

#: Rows of a batch: at most, and at least.
MOST, LEAST = 32, 4
#: Maximum bytes of what one batch's graph keeps for the backward pass.
GRAPH_BYTES = 256 << 20


def rows_at_once(model: TaskModel, processor: Processor, examples: Examples) -> int:
    """MOST, or as many of the longest row as GRAPH_BYTES hold; a power of two."""
    longest = examples.take(processor.order(examples)[-1:])
    (batch,) = batches(processor, longest, 1)
    try:
        rows, each = MOST, saved_bytes(model, batch.inputs)
    except RuntimeError:  # no gradients flow through the model
        return MOST
    while rows > LEAST and rows * each > GRAPH_BYTES:
        rows //= 2
    return rows


def saved_bytes(model: TaskModel, inputs: Inputs) -> int:
    """Bytes of the tensors that autograd keeps for the backward pass of one pass, without the weights."""
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    sizes: dict[int, int] = {}
    kept: list[torch.Tensor] = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            sizes[storage.data_ptr()] = storage.nbytes()
            kept.append(tensor)  # until the end, or its address would be used again
        return tensor

    frozen = [parameter for parameter in model.parameters() if not parameter.requires_grad]
    for parameter in frozen:
        parameter.requires_grad_(parameter.is_floating_point())
    try:
        with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            model(**inputs)
    finally:
        for parameter in frozen:
            parameter.requires_grad_(False)
    return sum(sizes.values())
