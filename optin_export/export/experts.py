"""Mixtures of experts as gathers of weights during an export: loops over experts that are in use have no graph."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Protocol, runtime_checkable

from torch import nn


@runtime_checkable
class _ChoosesExperts(Protocol):
    """A model of transformers."""

    def set_experts_implementation(self, experts_implementation: str | dict[str, str | None]) -> None: ...

    def get_experts_implementation(self) -> dict[str, str | None]: ...


@contextlib.contextmanager
def experts_by_gather(model: nn.Module) -> Iterator[None]:
    """Let transformers' mixtures of experts compute all tokens at once, with their experts' weights gathered."""
    before = []
    for part in model.modules():
        if isinstance(part, _ChoosesExperts):
            own = part.get_experts_implementation()
            with contextlib.suppress(ValueError, ImportError, RuntimeError):  # other models are not changed
                part.set_experts_implementation("batched_mm")
                before.append((part, own))
    try:
        yield
    finally:
        for part, own in reversed(before):
            part.set_experts_implementation(own)
