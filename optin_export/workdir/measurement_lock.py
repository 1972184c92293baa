"""A machine-wide lock: a process that measures has the machine for itself; processes that only compute share it.

A readers-writer lock in two files of a private folder of the user. The kernel holds it: it ends with its process, also
if that is killed. It applies to all processes of one user that can see that folder, including several Ray nodes on one
machine; containers with separate folders do not see each other. Other users cannot open the files, so they cannot block
anyone.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import stat
import tempfile
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path

from optin_export.errors import EnvironmentLacks
from optin_export.workdir.files import open_in, opened_folder

Quiet = Callable[[], AbstractContextManager[None]]


class Machine:
    """This process's part in the lock. `busy` and `quiet` are not to be nested within themselves."""

    def __init__(self, folder: Path | None = None) -> None:
        self.folder = _own_folder() if folder is None else folder
        # Every process takes the gate briefly on entry; one that waits to measure keeps it, so nobody overtakes it.
        self.gate, self.room = "gate", "lock"
        self.held: int | None = None

    @contextlib.contextmanager
    def busy(self) -> Iterator[None]:
        """Compute at the same time as other processes, but not while a process measures."""
        self.held = self._enter(fcntl.LOCK_SH)
        try:
            yield
        finally:
            self._leave()

    @contextlib.contextmanager
    def quiet(self) -> Iterator[None]:
        """Measure: wait until all other processes have finished computing, and block them; also within `busy`."""
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
        with opened_folder(self.folder) as folder:
            gate = open_in(folder, self.gate, os.O_RDWR | os.O_CREAT, 0o600)
            try:
                fcntl.flock(gate, fcntl.LOCK_EX)
                room = open_in(folder, self.room, os.O_RDWR | os.O_CREAT, 0o600)
                fcntl.flock(room, how)
                return room
            finally:
                os.close(gate)

    def _leave(self) -> None:
        if self.held is not None:
            os.close(self.held)
            self.held = None


def _own_folder() -> Path:
    """A folder that only this user can open: in the temporary folder, or, if another user has taken its name there, in
    the user's cache. All processes of the user find the same folder."""
    places = (
        Path(tempfile.gettempdir()) / f"optin-export-{os.getuid()}",
        Path.home() / ".cache" / "optin-export",
    )
    for place in places:
        with contextlib.suppress(OSError):
            place.mkdir(mode=0o700, parents=True, exist_ok=True)
            found = place.lstat()
            if stat.S_ISDIR(found.st_mode) and found.st_uid == os.getuid() and not found.st_mode & 0o022:
                return place
    raise EnvironmentLacks(
        "this user has no folder for the machine's lock",
        f"neither {places[0]} nor {places[1]} can be made, or is this user's alone",
        "set TMPDIR to a folder of your own",
    )
