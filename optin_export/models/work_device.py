"""Where Gram matrices are summed and solved: on the device of a model that was moved as a whole, else on the CPU.

On that device nothing is copied to the CPU within a loop over batches. The parts of a divided model are on several
devices, so their rows meet on the CPU.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar

import torch

_CPU = torch.device("cpu")
_DEVICE: ContextVar[torch.device] = ContextVar("work device", default=_CPU)


def work_device() -> torch.device:
    return _DEVICE.get()


def gathered(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor on the work device; itself, if it is there already."""
    return tensor.to(_DEVICE.get())


@contextlib.contextmanager
def working_on(device: torch.device) -> Iterator[None]:
    token = _DEVICE.set(device)
    try:
        yield
    finally:
        _DEVICE.reset(token)
