"""A model repository in an object store or another file system that fsspec knows (`s3://`, `gs://`, `memory://` ...).

Such a store has no rename of folders: a shipment is uploaded file by file. config.pbtxt and manifest.json of a model
come last, so that an upload that breaks off leaves a model that `ship` and a fresh server can tell from a whole one.
Nothing is kept for `rollback`.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from optin_export.errors import EnvironmentLacks, InputError
from optin_export.ship.manifest import NAME, content_of_manifest, read_manifest

#: Uploaded after all other files of a model, in this order.
_LAST = ("config.pbtxt", NAME)
#: Part of a URL that a local path does not have.
MARK = "://"


@dataclass(frozen=True)
class Store:
    """A repository at a URL."""

    url: str
    files: Any
    root: str

    @classmethod
    def open(cls, url: str) -> Store:
        """Raises InputError for an unknown scheme, EnvironmentLacks if its package is missing or cannot connect."""
        import fsspec

        try:
            files, root = fsspec.core.url_to_fs(url)
        except ImportError as error:
            raise EnvironmentLacks(f"cannot write to {url}", str(error), "install the package it names") from None
        except ValueError as error:
            raise InputError(f"cannot write to {url}", str(error), "see fsspec's list of protocols") from None
        except Exception as error:  # every store raises its own types
            raise _unusable(url, error) from None
        return cls(url.rstrip("/"), files, root.rstrip("/"))

    def upload(self, local: Path, names: Sequence[str], run: str, replace: bool) -> list[str]:
        """Upload the models `names` of the repository `local`; returns those that changed.

        run: identity of the shipped run; models of another run, or of unknown origin, are refused unless `replace`.
        Raises InputError for a refused model, EnvironmentLacks if the store fails.
        """
        try:
            there = {name: self._manifest(name) for name in names}
            if not replace:
                for name, manifest in there.items():
                    self._refuse_foreign(name, manifest, run)
            changed = [name for name in names if not self._same(local / name, there[name])]
            for name in changed:
                self._put(local / name)
            return changed
        except (InputError, EnvironmentLacks):
            raise
        except Exception as error:
            raise _unusable(self.url, error) from None

    def _path(self, *parts: str) -> str:
        return "/".join((self.root, *parts))

    def _manifest(self, name: str) -> dict[str, Any] | None:
        """The manifest of a model in the store; {} for a model without a readable one, None for no model."""
        try:
            found = json.loads(self.files.cat_file(self._path(name, NAME)))
            return found if isinstance(found, dict) else {}
        except FileNotFoundError:
            return {} if self._present(name) else None
        except ValueError:
            return {}

    def _present(self, name: str) -> list[str]:
        """Files of a model in the store, relative to its folder."""
        folder = self._path(name)
        try:
            found = self.files.find(folder)
        except FileNotFoundError:
            return []
        start = len(self.files._strip_protocol(folder)) + 1
        return [str(path)[start:] for path in found]

    def _refuse_foreign(self, name: str, manifest: dict[str, Any] | None, run: str) -> None:
        if manifest is None or manifest.get("shipped_from") == run:
            return
        owner = manifest.get("shipped_from") or "elsewhere: it has no manifest of optin-export"
        raise InputError(
            f"{self.url} already has another model '{name}'",
            f"it comes from {owner}",
            "choose another name with --name, or overwrite it with --replace",
        )

    def _same(self, folder: Path, manifest: dict[str, Any] | None) -> bool:
        """Whether the store has the same model, every file of the manifest's size."""
        if not manifest or content_of_manifest(read_manifest(folder)) != content_of_manifest(manifest):
            return False
        try:
            sizes = {name: entry["bytes"] for name, entry in manifest["files"].items()}
            return set(self._present(folder.name)) == {*sizes, NAME} and all(
                self.files.size(self._path(folder.name, name)) == size for name, size in sizes.items()
            )
        except (KeyError, TypeError, AttributeError, FileNotFoundError):
            return False

    def _put(self, folder: Path) -> None:
        files = {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file()}
        before = self._present(folder.name)
        if NAME in before:  # from here on until the end, the model counts as incomplete
            self.files.rm_file(self._path(folder.name, NAME))
        for name in (*(name for name in files if name not in _LAST), *(name for name in _LAST if name in files)):
            target = self._path(folder.name, name)
            self.files.makedirs(target.rpartition("/")[0], exist_ok=True)
            self.files.put_file(str(files[name]), target)
        for name in before:
            if name not in files:
                self.files.rm_file(self._path(folder.name, name))


def _unusable(url: str, error: Exception) -> EnvironmentLacks:
    text = " ".join((str(error) or type(error).__name__).split())[:300]
    return EnvironmentLacks(
        f"cannot write to {url}", f"{type(error).__name__}: {text}", "check address, credentials and permissions"
    )
