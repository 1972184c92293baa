"""Files that appear whole or not at all, and the hashes that name their content."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
import stat
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from optin_export.errors import EnvironmentLacks

#: Bytes of a JSON file that are read at most. The largest we write, measure/latency.json, holds every measured call.
MAX_JSON = 256 << 20
_SCRATCH = "optin-export-scratch-"


@contextlib.contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; when the body ends well it is fsynced and renamed to `path`.

    Raises EnvironmentLacks when the folder cannot be written (read-only, full disk).
    """
    temporary: Path | None = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # The suffix is kept: some libraries choose the format by it.
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=".tmp-", suffix=path.suffix)
        os.close(handle)
        temporary = Path(name)
        yield temporary
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        temporary.chmod(0o644)  # mkstemp makes private files; a run folder is read by servers under other users
        temporary.replace(path)
    except OSError as error:
        raise EnvironmentLacks(
            f"cannot write {path}", error.strerror or str(error), "free disk space or choose another folder with --out"
        ) from error
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)


def write_bytes(path: Path, data: bytes) -> None:
    with atomic_path(path) as temporary:
        temporary.write_bytes(data)


def write_text(path: Path, text: str) -> None:
    write_bytes(path, text.encode("utf-8"))


def write_json(path: Path, value: Any) -> None:
    """Sorted-independent, human-readable JSON; NaN and infinities are refused because JSON has no such numbers."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def write_checked(path: Path, data: bytes) -> None:
    """Write bytes with their sha256 behind them, for `read_checked`."""
    write_bytes(path, data + hashlib.sha256(data).digest())


def read_checked(path: Path, limit: int) -> bytes | None:
    """What `write_checked` wrote; None where there is nothing, it is damaged, or it is larger than `limit` bytes."""
    try:
        if path.stat().st_size > limit + hashlib.sha256().digest_size:
            return None
        whole = path.read_bytes()
    except OSError:
        return None
    data, digest = whole[:-32], whole[-32:]
    return data if hashlib.sha256(data).digest() == digest else None


def read_json(path: Path, limit: int = MAX_JSON) -> Any:
    """The value in a JSON file, whoever wrote it. Raises OSError, or ValueError for what is none."""
    try:
        return json.loads(read_text(path, limit))
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def read_text(path: Path, limit: int = MAX_JSON) -> str:
    """A UTF-8 file of at most `limit` bytes. Raises OSError or ValueError."""
    with path.open("rb") as file:
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            raise ValueError("it is no file")  # a device would never end
        data = file.read(limit + 1)
    if len(data) > limit:
        raise ValueError(f"it is larger than {limit} bytes")
    return data.decode("utf-8")


def sha256_file(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sha256_json(value: Any) -> str:
    """Hash of a JSON-serialisable value, independent of the order of keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, ensure_ascii=True).encode()).hexdigest()


class Scratch:
    """A temporary folder that is found and deleted by `clear_scratch` should this process be killed.

    path: the folder. It is held by a lock that the kernel gives back when the process ends, however it ends.
    """

    def __init__(self) -> None:
        self.path = Path(tempfile.mkdtemp(prefix=_SCRATCH))
        try:
            self._lock = (self.path / "lock").open("w")
        except OSError:
            shutil.rmtree(self.path, ignore_errors=True)
            raise
        fcntl.flock(self._lock, fcntl.LOCK_EX)

    def close(self) -> None:
        self._lock.close()
        shutil.rmtree(self.path, ignore_errors=True)


def clear_scratch(age: float = 60.0) -> None:
    """Delete scratch folders whose process has gone. age: seconds within which one may not have its lock yet."""
    for folder in Path(tempfile.gettempdir()).glob(f"{_SCRATCH}*"):
        with contextlib.suppress(OSError):  # of another user, or just deleted by another run
            state = folder.lstat()
            if not stat.S_ISDIR(state.st_mode) or time.time() - state.st_mtime < age:
                continue
            with (folder / "lock").open("r") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(folder, ignore_errors=True)
