"""Transfer files as bytes: pack a folder by content, and unpack it on a machine that cannot see this one's files."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from optin_export.errors import InputError
from optin_export.workdir.files import sha256_file, write_bytes


@dataclass(frozen=True)
class PackedFiles:
    """File contents by path below a folder, with the sha256 that each must have on arrival."""

    files: Mapping[str, bytes]
    hashes: Mapping[str, str]

    @property
    def size(self) -> int:
        """Bytes."""
        return sum(map(len, self.files.values()))


def pack(folder: Path, paths: Iterable[Path], known: Mapping[str, str] | None = None) -> PackedFiles:
    """Pack these files below `folder`, without those that the receiver already has (`known`: path -> sha256)."""
    files, hashes = {}, {}
    for path in sorted(paths):
        name, digest = path.relative_to(folder).as_posix(), sha256_file(path)
        if (known or {}).get(name) != digest:
            files[name], hashes[name] = path.read_bytes(), digest
    return PackedFiles(files, hashes)


def unpack(packed: PackedFiles, folder: Path) -> list[Path]:
    """Write the files below `folder`. Raises InputError for one that is damaged or would lie outside."""
    for name, data in packed.files.items():
        inside = not PurePosixPath(name).is_absolute() and ".." not in PurePosixPath(name).parts
        if not inside or hashlib.sha256(data).hexdigest() != packed.hashes.get(name):
            raise InputError(f"{name} did not arrive", "its content or its place is wrong", "run the command again")
    for name, data in packed.files.items():
        write_bytes(folder / name, data)
    return [folder / name for name in packed.files]


def hashes_of(folder: Path) -> dict[str, str]:
    """Path -> sha256 of every file below `folder`."""
    return {path.relative_to(folder).as_posix(): sha256_file(path) for path in folder.rglob("*") if path.is_file()}
