"""Finished shards in the run folder: an interrupted run continues where it stopped, and nothing counts twice."""

from __future__ import annotations

from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from optin_export.scoring import Partial, Shard
from optin_export.workdir.files import atomic_path, regular, remove, sha256_json


class Memory:
    """Results of the shards of one scoring, named by their content: the job's key and the shard's description.

    key: hash of all that the scoring depends on (model, data, settings, seed, code).
    """

    def __init__(self, folder: Path, key: str) -> None:
        self.folder, self.key = folder / key[:32], key

    def get(self, shard: Shard) -> Partial | None:
        """The result of the shard, if it is stored and undamaged."""
        try:
            with safe_open(regular(self._path(shard)), framework="numpy") as file:
                found = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
                return found if (file.metadata() or {}).get("sha256") == content_of(found) else None
        except (OSError, SafetensorError, ValueError):
            return None

    def put(self, shard: Shard, found: Partial) -> None:
        with atomic_path(self._path(shard)) as temporary:
            save_file(dict(sorted(found.items())), temporary, metadata={"sha256": content_of(found)})

    def clear(self) -> None:
        """Delete the shards' results, which are not needed once the scores are written."""
        remove(self.folder)

    def _path(self, shard: Shard) -> Path:
        return self.folder / f"{sha256_json({'job': self.key, 'shard': shard.to_json()})[:32]}.safetensors"


def content_of(found: Partial) -> str:
    """Hash of names, shapes and bytes."""
    import hashlib

    total = hashlib.sha256()
    for name, array in sorted(found.items()):
        total.update(f"{name}{array.dtype}{array.shape}".encode() + array.tobytes())
    return total.hexdigest()
