"""Write files atomically, and hash their content; `opening` opens them."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import re
import resource
import secrets
import shutil
import stat
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from optin_export.errors import EnvironmentLacks, OptinError
from optin_export.workdir.opening import (
    NotRegular,
    below,
    confined,
    make_folders,
    open_in,
    open_regular,
    opened_folder,
    read_bytes,
    refuse_links,
    regular,
)

__all__ = [
    "MAX_JSON",
    "MAX_TEXT",
    "NotRegular",
    "Scratch",
    "append_text",
    "atomic_path",
    "clear_scratch",
    "confined",
    "make_folders",
    "open_in",
    "open_regular",
    "opened_folder",
    "read_bytes",
    "read_checked",
    "read_json",
    "read_text",
    "refuse_links",
    "regular",
    "remove",
    "sha256_file",
    "sha256_json",
    "write_bytes",
    "write_checked",
    "write_json",
    "write_text",
    "writing",
]

#: Maximum bytes of a JSON file. The largest that we write, measure/latency.json, holds every measured call.
MAX_JSON = 256 << 20
#: Maximum bytes of a file that a person writes (a recipe, class names, a table of gates).
MAX_TEXT = 16 << 20
#: Maximum digits of a whole number in JSON: more than any hash, size or count has.
MAX_DIGITS = 100
_SCRATCH = "optin-export-scratch-"
#: Names of incomplete files: our own temporary names, and those of safetensors.
HALF_WRITTEN = re.compile(r"\.tmp-.*|\.tmp[A-Za-z0-9]{6}")
#: Messages of libraries that cannot write to a disk; most of them do not raise OSError.
_DISK = re.compile(
    r"no space left|disk quota|file too large|read-only file system|input/output error|os error (5|27|28|30|122)\b"
    r"|disk full|unexpected pos|write failed|failed writing|file write|cannot write|could not write",
    re.IGNORECASE,
)
#: A disk with less free space than this counts as full.
_NO_ROOM = 1 << 16


@contextlib.contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Yield a temporary path in the folder of `path`; if the body succeeds, it is fsynced and renamed to `path`.

    The temporary path is below a descriptor of the folder, so renaming the folder does not affect it. Raises
    EnvironmentLacks if the folder cannot be written (read-only, full disk), whichever library reports that, and
    InputError for a folder that is reached through a link (see `confined`).
    """
    # Keep the suffix, by which some libraries choose the format.
    name = f".tmp-{secrets.token_hex(8)}{path.suffix}"
    try:
        with opened_folder(path.parent) as folder:
            os.close(os.open(name, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600, dir_fd=folder))
            try:
                with _told_if_full(path, folder, name):
                    yield below(folder, path.parent) / name
                _finish(folder, name)
                os.rename(name, path.name, src_dir_fd=folder, dst_dir_fd=folder)
            finally:
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(name, dir_fd=folder)
    except OSError as error:
        raise _cannot_write(path, error.strerror or str(error)) from error


def _finish(folder: int, name: str) -> None:
    """Check that a regular file was written, flush it to the disk, and make it readable: servers under other users
    read a run folder."""
    handle = os.open(name, os.O_RDWR | os.O_NONBLOCK | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=folder)
    try:
        if not stat.S_ISREG(os.fstat(handle).st_mode):
            raise OSError(errno.EINVAL, "what was written is no regular file")
        os.fsync(handle)
        os.fchmod(handle, 0o644)
    finally:
        os.close(handle)


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Raise EnvironmentLacks for a full or broken disk, while a library writes `path` and raises its own errors."""
    try:
        with opened_folder(path.parent, make=False) as folder, _told_if_full(path, folder, path.name):
            yield
    except OSError as error:
        raise _cannot_write(path, error.strerror or str(error)) from error


@contextlib.contextmanager
def _told_if_full(path: Path, folder: int, name: str) -> Iterator[None]:
    try:
        yield
    except OSError:
        raise
    except Exception as error:
        reason = _disk_trouble(error, folder, name)
        if reason is None:
            raise
        raise _cannot_write(path, reason) from error


def _disk_trouble(error: Exception, folder: int, name: str) -> str | None:
    """The reason why the disk could not be written, if a library's error is about that."""
    if isinstance(error, EnvironmentLacks):
        return None
    disk = os.fstatvfs(folder)
    if disk.f_bavail * disk.f_frsize < _NO_ROOM:
        return os.strerror(errno.ENOSPC)
    most = resource.getrlimit(resource.RLIMIT_FSIZE)[0]
    with contextlib.suppress(OSError):
        size = os.stat(name, dir_fd=folder, follow_symlinks=False).st_size
        if most != resource.RLIM_INFINITY and size >= most:
            return os.strerror(errno.EFBIG)
    # Our own error is already explained, whatever words it quotes.
    message = "" if isinstance(error, OptinError) else str(error)
    return next(iter(message.strip().splitlines()), "")[:300] if _DISK.search(message) else None


def _cannot_write(path: Path, why: str) -> EnvironmentLacks:
    return EnvironmentLacks(f"cannot write {path}", why, "free disk space or choose another folder with --out")


def remove(path: Path) -> None:
    """Delete a file, a link (not its target), or a folder with its content; does nothing if it does not exist.

    Raises InputError if it is reached through a link inside a folder that is `confined`, and EnvironmentLacks if it
    cannot be deleted.
    """
    try:
        with opened_folder(path.parent, make=False) as folder:
            if stat.S_ISDIR(os.stat(path.name, dir_fd=folder, follow_symlinks=False).st_mode):
                shutil.rmtree(path.name, dir_fd=folder)
            else:
                os.unlink(path.name, dir_fd=folder)
    except FileNotFoundError:
        pass
    except OSError as error:
        raise EnvironmentLacks(f"cannot delete {path}", error.strerror or str(error), "check permissions") from error


def append_text(path: Path, text: str) -> None:
    """Append to a text file, which is created if it does not exist. Raises as `atomic_path` does."""
    flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT
    try:
        with opened_folder(path.parent) as folder, os.fdopen(open_in(folder, path.name, flags), "ab") as file:
            file.write(text.encode("utf-8", "backslashreplace"))
    except OSError as error:
        raise _cannot_write(path, error.strerror or str(error)) from error


def write_bytes(path: Path, data: bytes) -> None:
    with atomic_path(path) as temporary:
        temporary.write_bytes(data)


def write_text(path: Path, text: str) -> None:
    write_bytes(path, text.encode("utf-8"))


def write_json(path: Path, value: Any) -> None:
    """Write human-readable JSON; NaN and infinities are refused because JSON has no such numbers."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def write_checked(path: Path, data: bytes) -> None:
    """Write bytes followed by their sha256, for `read_checked`."""
    write_bytes(path, data + hashlib.sha256(data).digest())


def read_checked(path: Path, limit: int) -> bytes | None:
    """The bytes that `write_checked` wrote; None if missing, damaged, or larger than `limit` bytes."""
    try:
        whole = read_bytes(path, limit + hashlib.sha256().digest_size)
    except (OSError, ValueError):
        return None
    data, digest = whole[:-32], whole[-32:]
    return data if hashlib.sha256(data).digest() == digest else None


def read_json(path: Path, limit: int = MAX_JSON) -> Any:
    """The value in an untrusted JSON file. Raises OSError, or ValueError for invalid JSON."""
    text = read_text(path, limit)
    try:
        value = json.loads(text, parse_int=_whole_number)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    if "\\ud" in text.lower():  # surrogate halves, which could not be written again
        json.dumps(value, ensure_ascii=False).encode("utf-8")
    return value


def _whole_number(digits: str) -> int:
    """Parse a whole number; refuse longer ones, which take time to read and overflow later."""
    if len(digits) > MAX_DIGITS:
        raise ValueError(f"it holds a number of {len(digits)} digits")
    return int(digits)


def read_text(path: Path, limit: int = MAX_JSON) -> str:
    """A UTF-8 file of at most `limit` bytes. Raises OSError or ValueError."""
    return read_bytes(path, limit).decode("utf-8")


def sha256_file(path: Path) -> str:
    """Hash of a regular file, up to its size when it was opened. Raises OSError."""
    total = hashlib.sha256()
    with open_regular(path) as file:
        left = os.fstat(file.fileno()).st_size
        while left > 0 and (part := file.read(min(left, 1 << 20))):
            total.update(part)
            left -= len(part)
    return total.hexdigest()


def sha256_json(value: Any) -> str:
    """Hash of a JSON-serialisable value, independent of the order of keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, ensure_ascii=True).encode()).hexdigest()


class Scratch:
    """A temporary folder that `clear_scratch` finds and deletes if this process is killed.

    path: the folder. It is held by a lock that the kernel releases when the process ends, however it ends.
    """

    def __init__(self) -> None:
        self.path = Path(tempfile.mkdtemp(prefix=_SCRATCH))
        try:
            self._lock = (self.path / "lock").open("x")
        except OSError:
            shutil.rmtree(self.path, ignore_errors=True)
            raise
        fcntl.flock(self._lock, fcntl.LOCK_EX)

    def close(self) -> None:
        self._lock.close()
        shutil.rmtree(self.path, ignore_errors=True)


def clear_scratch(age: float = 60.0) -> None:
    """Delete scratch folders whose process has ended. age: seconds within which a folder may not have its lock yet."""
    for folder in Path(tempfile.gettempdir()).glob(f"{_SCRATCH}*"):
        with contextlib.suppress(OSError):  # just deleted by another run
            state = folder.lstat()
            if not stat.S_ISDIR(state.st_mode) or state.st_uid != os.getuid() or time.time() - state.st_mtime < age:
                continue
            with opened_folder(folder, make=False) as place, contextlib.ExitStack() as stack:
                with contextlib.suppress(FileNotFoundError):  # killed before it had its lock, or after it released it
                    lock = stack.enter_context(os.fdopen(open_in(place, "lock", os.O_RDONLY)))
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(folder, ignore_errors=True)
