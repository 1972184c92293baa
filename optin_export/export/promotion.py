"""Differences of a float and integers, such as `1.0 - attention_mask`, as differences of floats during an export.

torch's exporter makes type promotion explicit, and gives `sub` the float as its first argument, which must be a tensor.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch


@contextlib.contextmanager
def differences_of_floats() -> Iterator[None]:
    """`number - tensor` converts the tensor first within the body, where the difference would be of its type anyway."""
    original = torch.Tensor.__rsub__

    def subtracted(tensor: torch.Tensor, number: Any) -> Any:
        integers = not tensor.is_floating_point() and not tensor.is_complex()
        if isinstance(number, float) and integers:
            tensor = tensor.to(torch.get_default_dtype())
        return original(tensor, number)

    torch.Tensor.__rsub__ = subtracted  # type: ignore[method-assign]
    try:
        yield
    finally:
        torch.Tensor.__rsub__ = original  # type: ignore[method-assign]
