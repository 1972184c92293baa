"""One process at a time in a run folder: a lock that the kernel releases, however its holder ends."""

from __future__ import annotations

import contextlib
import datetime
import errno
import fcntl
import json
import os
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from optin_export.errors import EnvironmentLacks
from optin_export.workdir.files import NotRegular, confined, open_in, opened_folder

#: Hidden, so that no manifest lists it; in the step cache's folder, so that an unfinished run has no further entry.
LOCK = ".stages/lock"


@contextlib.contextmanager
def held(folder: Path, doing: str, wait: bool = False) -> Iterator[None]:
    """Lock the run folder for this process while the body runs; `doing` appears in other processes' errors.

    The folder is created if missing, and removed again if the body leaves it empty. A read-only folder is locked if it
    has a lock file, otherwise not at all: nobody else can change it either.
    Writing below it meanwhile follows no link out of it. wait: wait for the process that holds the lock, instead of an
    error. Raises EnvironmentLacks, naming the holder, and InputError for a folder that would be written through a link.
    """
    made = [place for place in (folder, *folder.parents) if not place.exists()]
    file = _open(folder / LOCK)
    if file is not None:
        file = _locked(file, folder, wait)
        _tell(file, doing)
    try:
        with confined(folder):
            yield
    finally:
        if file is not None:
            with contextlib.suppress(OSError):
                _forget(file)
                _remove_if_empty(folder, made)
            file.close()


def _open(path: Path) -> BinaryIO | None:
    for _ in range(1000):
        # Another process may remove an empty folder between the two steps: then they are repeated.
        with contextlib.suppress(FileNotFoundError, FileExistsError):
            return _made(path)
    folder = path.parent.parent
    raise EnvironmentLacks(
        f"cannot write {folder}", "it cannot be made, or vanishes", "choose another folder with --out"
    )


def _made(path: Path) -> BinaryIO | None:
    folder = path.parent.parent
    try:
        with confined(folder), opened_folder(path.parent) as place:
            return os.fdopen(open_in(place, path.name, os.O_RDWR | os.O_CREAT), "rb+", buffering=0)
    except (FileNotFoundError, FileExistsError):
        raise
    except OSError as error:
        if isinstance(error, NotRegular) or error.errno == errno.ELOOP:
            return None  # a link or a FIFO in its place is neither followed nor waited for
        if not folder.is_dir():
            raise EnvironmentLacks(
                f"cannot write {folder}", error.strerror or str(error), "choose another folder with --out"
            ) from None
        with contextlib.suppress(OSError), confined(folder), opened_folder(path.parent, make=False) as place:
            return os.fdopen(open_in(place, path.name, os.O_RDONLY), "rb", buffering=0)
        return None  # a later write here reports the reason


def _locked(file: BinaryIO, folder: Path, wait: bool) -> BinaryIO:
    """The locked lock file. If another process has removed the file meanwhile, the new one is locked."""
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            holder = _holder(file)
            file.close()
            raise EnvironmentLacks(
                f"{folder} is in use",
                f"{holder} holds it",
                "wait until that has ended (--wait does), or name another folder",
            ) from None
        with contextlib.suppress(OSError):
            if os.path.samestat((folder / LOCK).lstat(), os.fstat(file.fileno())):
                return file
        file.close()
        again = _open(folder / LOCK)
        if again is None:
            raise EnvironmentLacks(f"cannot write {folder}", "its lock cannot be made", "check permissions")
        file = again


def _tell(file: BinaryIO, doing: str) -> None:
    since = datetime.datetime.now().astimezone().isoformat(timespec="seconds")
    holder = {"doing": doing, "pid": os.getpid(), "host": socket.gethostname(), "since": since}
    with contextlib.suppress(OSError):  # a full disk, or opened for reading only: the lock is still held
        file.seek(0)
        file.truncate()
        file.write(json.dumps(holder).encode() + b"\n")


def _holder(file: BinaryIO) -> str:
    try:
        file.seek(0)
        holder = json.loads(file.read(10_000))
        return f"{holder['doing']} (process {holder['pid']} on {holder['host']}, since {holder['since']})"
    except (OSError, ValueError, KeyError, TypeError):
        return "another optin-export"


def _forget(file: BinaryIO) -> None:
    file.seek(0)
    file.truncate()


def _remove_if_empty(folder: Path, made: list[Path]) -> None:
    """Remove the folder, and the parents made for it, if a run was refused before it wrote anything."""
    place = (folder / LOCK).parent
    if {path.name for path in folder.iterdir()} == {place.name} and {path.name for path in place.iterdir()} == {"lock"}:
        (folder / LOCK).unlink()
        place.rmdir()
        for empty in made:  # the innermost first, until one is not empty
            empty.rmdir()
