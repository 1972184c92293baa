"""Which renames a change of a model repository consists of, written down before the first: a killed one can be undone.

A shipment renames several models, and no file system renames several folders at once. Without this, the repository
would stay half changed after a kill, and what a rollback puts back would be half of what was there.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from optin_export.files import read_json, write_json

NAME = "journal.json"
#: Bytes that a journal has at most: some renames of a few models.
_LIMIT = 1 << 20


@dataclass(frozen=True)
class Move:
    """A model folder's way, and its inode, which a rename keeps: by it is known where the folder is."""

    source: Path
    target: Path
    inode: int

    @property
    def made(self) -> bool:
        return _inode(self.target) == self.inode


def carry_out(path: Path, repository: Path, ways: Sequence[tuple[Path, Path]]) -> None:
    """Every rename or none: where one fails at once, after a kill by the next command that reads the journal `path`."""
    if not ways:
        return
    moves = write(path, repository, ways)
    try:
        for move in moves:
            move.source.rename(move.target)
    except BaseException:
        undo(moves)
        path.unlink()
        raise
    _sync(repository)
    path.unlink()


def write(path: Path, repository: Path, ways: Sequence[tuple[Path, Path]]) -> list[Move]:
    """Write down what is about to be renamed in this order. path: beside the repository; every end of a way is in the
    repository, or in a folder beside the journal."""
    moves, moved = [], dict[Path, int]()
    for source, target in ways:
        moved[target] = moved.pop(source) if source in moved else source.lstat().st_ino
        moves.append(Move(source, target, moved[target]))
    write_json(path, [[_told(move.source, repository), _told(move.target, repository), move.inode] for move in moves])
    return moves


def read(path: Path, repository: Path) -> list[Move]:
    """The moves of a journal; none where there is none, or one that nobody of us wrote."""
    try:
        return [
            Move(_end(source, path.parent, repository), _end(target, path.parent, repository), int(inode))
            for source, target, inode in read_json(path, _LIMIT)
        ]
    except (OSError, ValueError, TypeError):
        return []


def complete(moves: Sequence[Move]) -> bool:
    """Whether the last of them was made: then all were."""
    return not moves or moves[-1].made


def undo(moves: Sequence[Move]) -> None:
    """Undo those that were made, from the last one."""
    for move in reversed(moves):
        if move.made and not os.path.lexists(move.source):
            move.target.rename(move.source)


def _sync(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _inode(path: Path) -> int | None:
    try:
        return path.lstat().st_ino
    except OSError:
        return None


def _told(end: Path, repository: Path) -> list[str]:
    return ["" if end.parent == repository else end.parent.name, end.name]


def _end(told: Sequence[str], beside: Path, repository: Path) -> Path:
    place, name = told
    if not _is_name(name) or (place and not _is_name(place)):
        raise ValueError("a journal names models, nothing else")
    return (beside / place if place else repository) / name


def _is_name(text: str) -> bool:
    return text not in ("", ".", "..") and Path(text).name == text and "\0" not in text
