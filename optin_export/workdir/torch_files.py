"""File objects for torch to write into.

If torch writes a file itself, a full disk ends the process: its writer throws in its destructor, and C++ aborts.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO


class Sink:
    """A file object that stores its first error, and then accepts data without writing it."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self.error: OSError | None = None

    def write(self, data: bytes) -> int:
        if self.error is None:
            try:
                left = memoryview(data).cast("B")
                while left:
                    left = left[self._file.write(left) :]
            except OSError as error:
                self.error = error
        return memoryview(data).nbytes

    def flush(self) -> None:
        return None


@contextlib.contextmanager
def sink(path: Path) -> Iterator[Sink]:
    """A `Sink` into `path`; its error is raised after the body."""
    with path.open("wb", buffering=0) as file:
        made = Sink(file)
        yield made
    if made.error is not None:
        raise made.error
