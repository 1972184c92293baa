"""Folders of images or recordings: list the files, and find the class of each by its folder or its name."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

from optin_export.errors import InputError

#: Files of operating systems and notebooks, in addition to names that begin with a dot.
_LEFTOVERS = ("__MACOSX", "@eaDir", "__pycache__", "$RECYCLE.BIN", "lost+found")


def list_files(root: Path, suffixes: Sequence[str]) -> list[Path]:
    """All files with these suffixes below a folder, in the order of their paths.

    Links are followed; hidden files and folders are left out.
    """
    found: list[Path] = []

    def walk(folder: Path, above: frozenset[str]) -> None:
        real = os.path.realpath(folder)
        if real in above:  # a link to a parent folder
            return
        for entry in sorted(folder.iterdir()) if folder.is_dir() else ():
            if _is_hidden(entry):
                continue
            if entry.is_dir():
                walk(entry, above | {real})
            elif entry.suffix.lower() in suffixes:
                found.append(entry)

    walk(root, frozenset())
    return sorted(found)


def class_folders(files: Sequence[Path], root: Path) -> tuple[list[str], tuple[str, ...]]:
    """The class of every file, and all classes: the folders directly below `root`, as in torchvision's ImageFolder.

    Folders without a file are classes too, because the numbers of the others depend on them. Raises InputError for
    a file outside all folders.
    """
    stray = next((file for file in files if file.parent == root), None)
    if stray is not None:
        raise InputError(
            f"no label for '{stray.name}'", "it is not in a class folder", "set label_pattern, or use sub-folders"
        )
    names = [entry.name for entry in root.iterdir() if entry.is_dir() and not _is_hidden(entry)]
    return [file.relative_to(root).parts[0] for file in files], natural_order(names)


def named_classes(files: Sequence[Path], pattern: str) -> tuple[list[str], tuple[str, ...]]:
    """The class of every file by group 1 of a regular expression in its name, and all classes.

    Raises InputError for a file whose name does not match.
    """
    found = []
    for file in files:
        match = re.search(pattern, file.name)
        if match is None or not match.group(1):
            raise InputError(f"no label in '{file.name}'", "label_pattern does not match", "correct label_pattern")
        found.append(match.group(1))
    return found, natural_order(set(found))


def natural_order(names: Iterable[str]) -> tuple[str, ...]:
    """Names in order, numbers in them by their value: 2 before 10."""

    def key(name: str) -> tuple[list[tuple[int, int, str]], str]:
        parts = re.split(r"(\d+)", name)
        return [(0, int(part), "") if part.isdecimal() else (1, 0, part) for part in parts if part], name

    return tuple(sorted(names, key=key))


def _is_hidden(path: Path) -> bool:
    return path.name.startswith(".") or path.name in _LEFTOVERS
