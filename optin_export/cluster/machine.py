"""One machine, one clock: who measures has the machine for itself, who only computes shares it.

A lock of readers and writers in two files of the machine's temporary folder, held by the kernel: it ends with its
process, also when that is killed. It binds all processes of one user that can see that folder, whatever started them,
so also several Ray nodes on one machine; containers with folders of their own do not see each other.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path

Quiet = Callable[[], AbstractContextManager[None]]


class Machine:
    """This process's part in the lock. `busy` and `quiet` are not to be nested within themselves."""

    def __init__(self, folder: Path | None = None) -> None:
        folder = folder or Path(tempfile.gettempdir())
        # The gate is taken for a moment by who comes, and kept by who waits to measure: nobody overtakes it.
        self.gate = folder / f"optin-export-{os.getuid()}.gate"
        self.room = folder / f"optin-export-{os.getuid()}.lock"
        self.held: int | None = None

    @contextlib.contextmanager
    def busy(self) -> Iterator[None]:
        """Compute beside others, but not while anybody measures."""
        self.held = self._enter(fcntl.LOCK_SH)
        try:
            yield
        finally:
            self._leave()

    @contextlib.contextmanager
    def quiet(self) -> Iterator[None]:
        """Measure: waits until all others are done with what they compute, and keeps them away; also within `busy`."""
        shared = self.held is not None
        self._leave()
        self.held = self._enter(fcntl.LOCK_EX)
        try:
            yield
        finally:
            self._leave()
            if shared:
                self.held = self._enter(fcntl.LOCK_SH)

    def _enter(self, how: int) -> int:
        gate = os.open(self.gate, os.O_RDWR | os.O_CREAT, 0o600)
        try:
            fcntl.flock(gate, fcntl.LOCK_EX)
            room = os.open(self.room, os.O_RDWR | os.O_CREAT, 0o600)
            fcntl.flock(room, how)
            return room
        finally:
            os.close(gate)

    def _leave(self) -> None:
        if self.held is not None:
            os.close(self.held)
            self.held = None
