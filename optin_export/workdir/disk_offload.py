"""Store large values in memory up to a limit, and in temporary files above it."""

from __future__ import annotations

import dataclasses
import tempfile
import weakref
from typing import IO, Any, cast

import torch

from optin_export.errors import EnvironmentLacks
from optin_export.workdir.files import Scratch
from optin_export.workdir.torch_files import sink

#: Maximum bytes that all `OffloadedTensors` together hold in memory, whatever the number of rows.
IN_MEMORY = 512 << 20


_every: weakref.WeakSet[OffloadedTensors] = weakref.WeakSet()


class OffloadedTensors:
    """Tensors, or dictionaries and tuples of them, by number.

    purpose, fix: for the error if a temporary file cannot be written (EnvironmentLacks).
    """

    def __init__(self, purpose: str, fix: str) -> None:
        self.purpose, self.fix = purpose, fix
        self._held: dict[int, Any] = {}
        self._bytes: dict[int, int] = {}
        self._filed: set[int] = set()
        self._scratch: Scratch | None = None
        _every.add(self)

    def __contains__(self, number: int) -> bool:
        return number in self._held or number in self._filed

    def __setitem__(self, number: int, value: Any) -> None:
        self._held.pop(number, None)
        self._bytes.pop(number, None)
        self._filed.discard(number)
        size = bytes_of(value)
        if sum(sum(one._bytes.values()) for one in _every) + size <= IN_MEMORY:
            self._held[number], self._bytes[number] = value, size
            return
        try:
            if self._scratch is None:
                self._scratch = Scratch()
                weakref.finalize(self, self._scratch.close)  # at the latest when Python ends
            with sink(self._scratch.path / f"{number}.pt") as file:
                torch.save(value, cast(IO[bytes], file))
        except (OSError, RuntimeError) as error:  # torch has reported a full disk as a RuntimeError
            raise EnvironmentLacks(
                f"cannot keep activations for {self.purpose}",
                f"{tempfile.gettempdir()}: {str(error).splitlines()[0][:200]}",
                f"free disk space, set TMPDIR to another disk, or {self.fix}",
            ) from error
        self._filed.add(number)

    def __getitem__(self, number: int) -> Any:
        if number in self._held:
            return self._held[number]
        assert self._scratch is not None
        # A file of this process, in a folder that only its user can open; blocks may return types of their own.
        return torch.load(self._scratch.path / f"{number}.pt", weights_only=False)

    def close(self) -> None:
        self._held.clear()
        self._bytes.clear()
        if self._scratch is not None:
            self._scratch.close()


def bytes_of(value: Any) -> int:
    """Bytes of all tensors in a value when stored; a tensor without strides (a placeholder) takes nothing."""
    if isinstance(value, torch.Tensor):
        return value.element_size() if not any(value.stride()) else value.numel() * value.element_size()
    if isinstance(value, dict):
        return sum(map(bytes_of, value.values()))
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return sum(map(bytes_of, vars(value).values()))
    return sum(map(bytes_of, value)) if isinstance(value, tuple | list) else 0
