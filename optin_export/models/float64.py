"""A task model in float64, against which the rounding of float32 is measured."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from functools import cache

import numpy as np
import torch
from torch import nn


def in_float64(model: nn.Module) -> Callable[[Mapping[str, np.ndarray]], np.ndarray | None]:
    """A copy of a task model in float64 as a function of named arrays; the copy is made at the first call.

    The function returns the output in float64, or None where the model does not run in float64 (its code names another
    type) or its output is not finite.
    """

    @cache
    def exact() -> nn.Module:
        return copy.deepcopy(model).double()

    def function(inputs: Mapping[str, np.ndarray]) -> np.ndarray | None:
        tensors = {name: torch.from_numpy(array) for name, array in inputs.items()}
        wide = {name: one.double() if one.is_floating_point() else one for name, one in tensors.items()}
        try:
            with torch.no_grad():
                output = exact()(**wide)
        except Exception:  # the model's own code may raise anything, on a type that it does not expect
            return None
        return output.numpy() if output.dtype == torch.float64 and bool(output.isfinite().all()) else None

    return function
