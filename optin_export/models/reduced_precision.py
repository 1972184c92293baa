"""Passes in bfloat16, for gradients that are estimates anyway, where the machine computes them faster."""

from __future__ import annotations

import contextlib

import torch

from optin_export.environment import multiplies_bfloat16
from optin_export.models.tasks import TaskModel

#: Weights from which it is tried: a pass of a smaller model takes little time anyway.
SMALLEST = 4_000_000
#: NVIDIA GPUs from here on multiply bfloat16 in their tensor cores.
AMPERE = (8, 0)


def gains_by_bfloat16(model: TaskModel) -> bool:
    """Whether passes of the model, where it is now, are faster in bfloat16: by its size and the device's instructions.

    Not by a clock: the same model is then always computed in the same way on one machine.
    """
    parameters = list(model.parameters())
    if any(one.is_floating_point() and one.dtype != torch.float32 for one in parameters):
        return False
    if sum(one.numel() for one in parameters) < SMALLEST:
        return False
    devices = {one.device for one in parameters}
    if any(device.type not in ("cpu", "cuda") for device in devices):
        return False
    return all(
        multiplies_bfloat16() if device.type == "cpu" else torch.cuda.get_device_capability(device) >= AMPERE
        for device in devices
    )


def passes_in(model: TaskModel, dtype: str | None) -> contextlib.AbstractContextManager[object]:
    """A context for forward passes of the model: torch.autocast to "bfloat16" or "float16"; None: as the model is."""
    if dtype is None:
        return contextlib.nullcontext()
    device = "cuda" if any(parameter.is_cuda for parameter in model.parameters()) else "cpu"
    return torch.autocast(device, getattr(torch, dtype))
