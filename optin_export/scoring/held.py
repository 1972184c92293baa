"""Reference passes of many batches, in memory up to a limit and in temporary files beyond it."""

from __future__ import annotations

import tempfile
import weakref
from typing import Any

import torch

from optin_export.errors import InputError
from optin_export.files import Scratch
from optin_export.scoring.losses import Reference

#: Bytes of reference passes that are kept in memory: it does not grow further with `prune.score_samples`.
IN_MEMORY = 1 << 30


class Held:
    """References by the number of their batch; the one read last of those in files is at hand."""

    def __init__(self) -> None:
        self._held: dict[int, Reference | None] = {}
        self._bytes = 0
        self._scratch: Scratch | None = None
        self._last: tuple[int, Reference] | None = None

    def __contains__(self, number: int) -> bool:
        return number in self._held

    def __setitem__(self, number: int, reference: Reference) -> None:
        """Raises InputError where a temporary file cannot be written."""
        size = _bytes(vars(reference))
        if self._bytes + size <= IN_MEMORY:
            self._bytes += size
            self._held[number] = reference
            return
        try:
            if self._scratch is None:
                self._scratch = Scratch()
                weakref.finalize(self, self._scratch.close)  # with the references, and at the end of Python at latest
            torch.save(vars(reference), self._scratch.path / f"{number}.pt")
        except (OSError, RuntimeError) as error:  # torch reports a full disk as a RuntimeError
            raise InputError(
                "cannot keep activations for the scores",
                f"{tempfile.gettempdir()}: {str(error).splitlines()[0][:200]}",
                "free disk space, set TMPDIR to another disk, or lower prune.score_samples",
            ) from error
        self._held[number] = None

    def __getitem__(self, number: int) -> Reference:
        held = self._held[number]
        if held is not None:
            return held
        if self._last is None or self._last[0] != number:
            assert self._scratch is not None
            self._last = None  # before the next one is loaded: two are never held
            # A file of this process, in a folder that only its user can open; blocks may return types of their own.
            fields = torch.load(self._scratch.path / f"{number}.pt", weights_only=False)
            self._last = (number, Reference(**fields))
        return self._last[1]


def _bytes(value: Any) -> int:
    if isinstance(value, torch.Tensor):
        return value.numel() * value.element_size()
    if isinstance(value, dict):
        return sum(_bytes(item) for item in value.values())
    return sum(_bytes(item) for item in value) if isinstance(value, tuple | list) else 0
