"""What no input may bring about: other exceptions than ours, code that runs, writes elsewhere, memory without bound."""

from __future__ import annotations

import contextlib
import os
import pickle
import resource
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from optin_export.errors import OptinError

#: Bytes of address space that a case may take beyond what the process has.
MEMORY = 3 << 30
#: Cases and refusals so far, by target.
CASES: Counter[str] = Counter()
REFUSED: Counter[str] = Counter()

#: The package's own programs that a command starts: a measurement of a graph in a fresh process.
PROGRAMS = ("'-m', 'optin_export.ship.load_alone'",)

#: Where this process forgets its own peak of memory.
_PEAK = f"/proc/{os.getpid()}/clear_refs"
_SCRATCH = os.path.realpath(tempfile.gettempdir()) + "/optin-export-scratch-"
_watched: list[tuple[Path, list[str]]] = []
_STARTS = ("subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "os.fork", "pty.spawn", "socket.connect")
_CHANGES = ("os.remove", "os.rename", "os.rmdir", "os.mkdir", "os.link", "os.symlink", "os.chmod", "shutil.rmtree")


def _audit(event: str, args: tuple[Any, ...]) -> None:
    """Sees every file that Python opens, and every process it starts, from whatever library."""
    if not _watched:
        return
    root, seen = _watched[-1]
    if event in _STARTS and not any(program in repr(args) for program in PROGRAMS):
        seen.append(f"{event}{args!r:.200}")
    elif event == "open":
        path, mode, flags = args
        writes = isinstance(flags, int) and flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
        if writes and not _is_below_a_descriptor(path, mode) and not _allowed(path, root):
            seen.append(f"wrote {path!r:.200}")
    elif event in _CHANGES and not _allowed(_whole(args), root, itself=True) and not _is_collected(event, _whole(args)):
        seen.append(f"{event} {_whole(args)!r:.200}")


def _is_below_a_descriptor(path: Any, mode: str | None) -> bool:
    """Opened by `os.open` (which has no mode) under a bare name: the package does so below the descriptor of a folder
    that it has opened by its whole path, and the event does not tell that folder."""
    return mode is None and isinstance(path, str) and "/" not in path


def _is_collected(event: str, path: Any) -> bool:
    """The end of a scratch folder that an earlier test of this process left to the garbage collector, which may run at
    any time. What the body makes lies below its own root."""
    return event in ("os.remove", "os.rmdir", "shutil.rmtree") and os.fsdecode(path).startswith(_SCRATCH)


sys.addaudithook(_audit)


def _whole(args: tuple[Any, ...]) -> Any:
    """The path of a change, which may be relative to an open folder (the last argument)."""
    path, folder = args[0], args[-1]
    if isinstance(path, str) and not path.startswith("/") and isinstance(folder, int) and folder >= 0:
        return os.path.join(os.path.realpath(f"/proc/self/fd/{folder}"), path)  # noqa: PTH118
    return path


def _allowed(path: Any, root: Path, itself: bool = False) -> bool:
    """itself: the call acts on a link itself, not on what it leads to."""
    if not isinstance(path, str | bytes | os.PathLike):
        return True  # a file that is open already
    whole = os.fsdecode(path)
    name = os.path.realpath(whole)
    if itself:
        name = f"{os.path.realpath(os.path.dirname(whole))}/{os.path.basename(whole)}"  # noqa: PTH119, PTH120
    return name in ("/dev/null", _PEAK, str(root)) or name.startswith(f"{root}/") or "__pycache__" in name


@contextlib.contextmanager
def watched(root: Path) -> Iterator[list[str]]:
    """The body's processes, connections and changes of files outside `root` (temporary files lie in it), as a list that
    fills; memory is bounded."""
    root = Path(os.path.realpath(root))
    seen: list[str] = []
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    before = tempfile.tempdir
    tempfile.tempdir = str(root)
    _watched.append((root, seen))
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + MEMORY, hard))
    try:
        yield seen
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
        _watched.pop()
        tempfile.tempdir = before


@contextlib.contextmanager
def harmless(target: str, root: Path) -> Iterator[None]:
    """The body may raise OptinError or nothing, and change files below `root` only. canary(root) must not appear."""
    CASES[target] += 1
    with watched(root) as seen:
        try:
            yield
        except OptinError as error:
            REFUSED[target] += 1
            assert error.exit_code in (2, 3, 4, 5)
            assert str(error).count("\n") == 2 and len(str(error)) < 6000, "three short lines"
    assert not seen, seen
    assert not canary(root).exists(), "code of the input ran"


def canary(root: Path) -> Path:
    """The file by which an input's code would show that it ran."""
    return Path(os.path.realpath(root)) / "canary"


class Bomb:
    """Unpickling it makes the canary."""

    def __init__(self, root: Path) -> None:
        self.mark = str(canary(root))

    def __reduce__(self) -> Any:
        return open, (self.mark, "w")


def bomb(root: Path, protocol: int = 2) -> bytes:
    return pickle.dumps(Bomb(root), protocol)
