"""The journal of a repository change: its renames, written before the first one, so that a killed change is undone.

A shipment renames several models, and no file system renames several folders at once. Without the journal, the
repository would stay partly changed after a kill, and a rollback would restore only a part.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from optin_export.workdir.files import read_json, write_json

NAME = "journal.json"
#: Maximum bytes of a journal: some renames of a few models.
_LIMIT = 1 << 20


@dataclass(frozen=True)
class Move:
    """The rename of one model folder, and its inode. A rename keeps the inode, which shows where the folder is now."""

    source: Path
    target: Path
    inode: int

    @property
    def made(self) -> bool:
        return _inode(self.target) == self.inode


def carry_out(path: Path, repository: Path, renames: Sequence[tuple[Path, Path]]) -> None:
    """Make every rename or none.

    Args:
        path: the journal to write, in a folder next to the repository.
        repository: the model repository.
        renames: (from, to), in the order in which they are made.

    If a rename fails, those before it are undone at once. If the process is killed, the next command that reads the
    journal undoes them.
    """
    if not renames:
        return
    moves = write(path, repository, renames)
    try:
        for move in moves:
            move.source.rename(move.target)
    except BaseException:
        undo(moves)
        path.unlink()
        raise
    _sync(repository)
    path.unlink()


def write(path: Path, repository: Path, renames: Sequence[tuple[Path, Path]]) -> list[Move]:
    """Write the journal, before the first rename. Each path of a rename is in the repository or in a folder next to the
    journal."""
    moves, moved = [], dict[Path, int]()
    for source, target in renames:
        moved[target] = moved.pop(source) if source in moved else source.lstat().st_ino
        moves.append(Move(source, target, moved[target]))
    write_json(
        path, [[_written(move.source, repository), _written(move.target, repository), move.inode] for move in moves]
    )
    return moves


def read(path: Path, repository: Path) -> list[Move]:
    """The moves of a journal. Empty if there is no journal, or if its content is not what `write` writes."""
    try:
        return [
            Move(_read(source, path.parent, repository), _read(target, path.parent, repository), int(inode))
            for source, target, inode in read_json(path, _LIMIT)
        ]
    except (OSError, ValueError, TypeError):
        return []


def complete(moves: Sequence[Move]) -> bool:
    """Whether all moves were made, which the last one shows: they are made in order."""
    return not moves or moves[-1].made


def undo(moves: Sequence[Move]) -> None:
    """Undo the moves that were made, last one first."""
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


def _written(path: Path, repository: Path) -> list[str]:
    return ["" if path.parent == repository else path.parent.name, path.name]


def _read(written: Sequence[str], folder: Path, repository: Path) -> Path:
    place, name = written
    if not _is_name(name) or (place and not _is_name(place)):
        raise ValueError("a journal names models, nothing else")
    return (folder / place if place else repository) / name


def _is_name(text: str) -> bool:
    return text not in ("", ".", "..") and Path(text).name == text and "\0" not in text
