"""How much of a model's output is rounding: the model in float32 against itself in float64."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from functools import cache

import numpy as np
import torch
from torch import nn


def rounding_of(model: nn.Module) -> Callable[[Mapping[str, np.ndarray]], float | None]:
    """By how much a task model differs from itself in float64, as a function of named arrays.

    The function returns the largest difference of a row, relative to the largest value of that row, or None where the
    model does not run in float64 (its code names another type).
    """

    @cache
    def exact() -> nn.Module:
        return copy.deepcopy(model).double()

    def function(inputs: Mapping[str, np.ndarray]) -> float | None:
        tensors = {name: torch.from_numpy(array) for name, array in inputs.items()}
        wide = {name: one.double() if one.is_floating_point() else one for name, one in tensors.items()}
        with torch.no_grad():
            got = model(**tensors)
            try:
                wanted = exact()(**wide)
            except Exception:  # the model's own code may raise anything, on a type that it does not expect
                return None
        if wanted.dtype != torch.float64 or not wanted.isfinite().all():
            return None
        rows, others = (one.double().flatten(1) for one in (got, wanted))
        return float(((rows - others).abs().amax(1) / others.abs().amax(1).clamp(min=1e-12)).max())

    return function
