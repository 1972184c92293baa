"""Open untrusted files and folders safely: without blocking, with bounded size, without following links outside.

Only regular files of bounded size are read. Files are written only below their folder: a link at the end of the path is
never followed, and no link on the way if the folder is `confined`.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from optin_export.errors import InputError

_FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC
_confined: list[str] = []
_confining = threading.Lock()


class NotRegular(OSError):
    """A folder, FIFO, socket or device in place of a file."""

    def __init__(self, path: Path) -> None:
        if path.is_dir():
            super().__init__(errno.EISDIR, "Is a directory", str(path))
        else:
            super().__init__(errno.EINVAL, "it is not a regular file", str(path))


def open_regular(path: Path) -> BinaryIO:
    """Open a regular file for reading; links are followed. Raises NotRegular or another OSError.

    Neither waits for a writer of a FIFO nor opens a device.
    """
    if not stat.S_ISREG(path.stat().st_mode):
        raise NotRegular(path)
    file = os.fdopen(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC), "rb")
    if stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        return file
    file.close()
    raise NotRegular(path)


def regular(path: str | Path, limit: int | None = None) -> Path:
    """Check a path that a library will open: it must be a regular file of at most `limit` bytes.

    Returns the path. Raises OSError for anything else, ValueError for a larger file.
    """
    path = Path(path)
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
    if limit is not None and size > limit:
        raise ValueError(f"it is larger than {limit} bytes")
    return path


def read_bytes(path: Path, limit: int) -> bytes:
    """The content of a regular file of at most `limit` bytes. Raises OSError, or ValueError for a larger one."""
    with open_regular(path) as file:
        data = file.read(limit + 1)
    if len(data) > limit:
        raise ValueError(f"it is larger than {limit} bytes")
    return data


@contextlib.contextmanager
def confined(root: Path) -> Iterator[None]:
    """While the body runs, this module follows no link below `root` when it writes there.

    `root` itself may be reached through links: its user named it.
    """
    place = os.path.abspath(root)  # noqa: PTH100 - links stay
    with _confining:
        _confined.append(place)
    try:
        yield
    finally:
        with _confining:
            _confined.remove(place)


@contextlib.contextmanager
def opened_folder(folder: Path, make: bool = True) -> Iterator[int]:
    """A descriptor of the folder, which is not affected by renames; the folder is created if `make`.

    Raises InputError if it is reached through a link inside a folder that is `confined`, and OSError.
    """
    place = os.path.abspath(folder)  # noqa: PTH100 - links stay
    with _confining:
        roots = [root for root in _confined if place == root or place.startswith(root.rstrip("/") + "/")]
    root = min(roots, key=len) if roots else place
    if make:
        make_folders(Path(root))
    handle = os.open(root, _FOLDER)
    try:
        for part in [part for part in place[len(root) :].split("/") if part]:
            inner = _inner(handle, part, make, folder)
            os.close(handle)
            handle = inner
        yield handle
    finally:
        os.close(handle)


def _inner(handle: int, part: str, make: bool, folder: Path) -> int:
    if make:
        with contextlib.suppress(FileExistsError):
            os.mkdir(part, 0o755, dir_fd=handle)
    try:
        return os.open(part, _FOLDER | os.O_NOFOLLOW, dir_fd=handle)
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.ENOTDIR):
            link = stat.S_ISLNK(os.stat(part, dir_fd=handle, follow_symlinks=False).st_mode)
            raise InputError(
                f"cannot write in {folder}",
                f"'{part}' on the way is {'a link, and would lead elsewhere' if link else 'no folder'}",
                f"put a folder in the place of '{part}', or take another folder",
            ) from None
        raise


def refuse_links(folder: Path) -> None:
    """Raises InputError now, before any work, if `folder` would be written through a link (see `confined`)."""
    with contextlib.suppress(FileNotFoundError), opened_folder(folder, make=False):
        pass


def make_folders(folder: Path) -> None:
    """Create the folder and its parents, writable only by this user whatever the umask is."""
    if not folder.is_dir():
        make_folders(folder.parent)
        folder.mkdir(mode=0o755, exist_ok=True)


def open_in(folder: int, name: str, flags: int, mode: int = 0o644) -> int:
    """A descriptor of a regular file in an opened folder, without following a link. Raises OSError."""
    handle = os.open(name, flags | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, mode, dir_fd=folder)
    if stat.S_ISREG(os.fstat(handle).st_mode):
        return handle
    os.close(handle)
    raise NotRegular(Path(name))


def below(folder: int, path: Path) -> Path:
    """A path to the descriptor's file, also valid in child processes; the plain path if there is no /proc."""
    place = Path(f"/proc/{os.getpid()}/fd/{folder}")
    return place if place.exists() else path
