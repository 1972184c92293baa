"""What can lie where a file is expected: each function puts its thing at a path."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from pathlib import Path

Put = Callable[[Path], None]


def _fresh(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        path.rename(path.with_name(f"{path.name}.before"))
    else:
        path.unlink(missing_ok=True)


def _fifo(path: Path) -> None:
    _fresh(path)
    os.mkfifo(path)


def _link(to: str) -> Put:
    def put(path: Path) -> None:
        _fresh(path)
        path.symlink_to(to)

    return put


def _linked_fifo(path: Path) -> None:
    _fifo(path.with_name("pipe"))
    _link("pipe")(path)


def _folder(path: Path) -> None:
    _fresh(path)
    path.mkdir()


def _socket(path: Path) -> None:
    """Bound beneath a descriptor of the folder: the name of a socket has little room for a path."""
    _fresh(path)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        with socket.socket(socket.AF_UNIX) as made:
            made.bind(f"/proc/self/fd/{folder}/{path.name}")
    finally:
        os.close(folder)


def _bytes(data: bytes) -> Put:
    def put(path: Path) -> None:
        _fresh(path)
        path.write_bytes(data)

    return put


def _sparse(path: Path) -> None:
    """A terabyte that takes no room."""
    _fresh(path)
    with path.open("wb") as file:
        file.truncate(1 << 40)


#: Things that no file of ours is.
NO_FILES: dict[str, Put] = {
    "a FIFO": _fifo,
    "a FIFO behind a link": _linked_fifo,
    "an endless device": _link("/dev/zero"),
    "a random device": _link("/dev/urandom"),
    "a terminal": _link("/dev/tty"),
    "a loop of links": lambda path: _link(path.name)(path),
    "a link to nothing": _link("/no/such/file"),
    "a folder": _folder,
    "a socket": _socket,
}
#: Files with nothing of ours in them.
NO_CONTENT: dict[str, Put] = {
    "empty": _bytes(b""),
    "a terabyte": _sparse,
    "binary": _bytes(bytes(range(256)) * 64),
    "half a character": _bytes(b'{"a": "\xc3'),
    "nested": _bytes(b"[" * 100_000),
    "a number of 400 digits": _bytes(b'{"version": ' + b"9" * 400 + b"}"),
    "a number of a million digits": _bytes(b'{"version": ' + b"9" * 1_000_000 + b"}"),
    "null": _bytes(b"null"),
    "a list": _bytes(b"[1, 2, 3]"),
    "text": _bytes(b"hello"),
    "infinite": _bytes(b'{"files": Infinity}'),
    "zero bytes": _bytes(b"\0" * 1000),
}
#: It says that it is a file, of no bytes.
KERNEL = {"a file of the kernel": _link("/proc/self/mem")}
THINGS = NO_FILES | NO_CONTENT | KERNEL
