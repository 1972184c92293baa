"""Access individual files of a model folder or hub model, without fetching the rest of the model."""

from __future__ import annotations

from pathlib import Path, PurePosixPath
from typing import Any

from optin_export.errors import InputError
from optin_export.workdir.files import read_json

MODULES, SETTINGS = "modules.json", "config_sentence_transformers.json"
_MOST_BYTES = 1 << 20


class Files:
    """Files of a model folder, or of a hub model: from the local cache, or fetched if `fetch`.

    unknown: names of files that could not be requested, because the hub was not reached.
    """

    def __init__(self, name: str, fetch: bool) -> None:
        self.name, self.fetch, self.local = name, fetch, Path(name).is_dir()
        self.unknown: list[str] = []

    def find(self, name: str) -> Path | None:
        """The file with this name, or None."""
        if self.local:
            path = Path(self.name) / name
            return path if path.is_file() else None
        from huggingface_hub import hf_hub_download, try_to_load_from_cache
        from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

        try:
            found = try_to_load_from_cache(self.name, name)
            if found is not None:
                return Path(found) if isinstance(found, str) else None
            return Path(hf_hub_download(self.name, name)) if self.fetch else None
        except LocalEntryNotFoundError:  # a subclass of EntryNotFoundError: the hub was not asked
            self.unknown.append(name)
        except EntryNotFoundError:
            pass
        except Exception:  # no such model, no network: loading the model will say so
            self.unknown.append(name)
        return None

    def read(self, name: str) -> Any:
        """The value in a JSON file, or None without that file. Raises InputError for a file that cannot be read."""
        path = self.find(name)
        if path is None:
            return None
        try:
            return read_json(path, _MOST_BYTES)
        except (OSError, ValueError) as error:
            raise InputError(f"cannot read {name} of {self.name}", str(error)[:200], "restore that file") from None

    def settings(self, name: str) -> dict[str, Any]:
        """The object in a JSON file, or {} if the file is missing. Raises InputError for anything else."""
        value = self.read(name)
        if value is None and self.find(name) is None:
            return {}
        if not isinstance(value, dict):
            raise InputError(f"cannot read {name} of {self.name}", "it is not a JSON object", "restore that file")
        return value


def name_of(source: str) -> str | None:
    """The folder or hub name of a model source that sentence-transformers could load; None for another source."""
    if source.startswith("hf:"):
        name = source.removeprefix("hf:")
        return None if name.startswith("model_type=") or not name else name
    return source if ":" not in source or Path(source).is_dir() else None


def transformer_subfolder(files: Files) -> str:
    """Where config.json is: "" at the top, or the folder that modules.json names for the transformer."""
    if files.find("config.json") is None:
        modules = files.read(MODULES)
        if isinstance(modules, list) and modules and isinstance(modules[0], dict):
            return inside(modules[0].get("path", ""), files.name)
    return ""


def transformer_folder(folder: Path) -> Path:
    """The part of a local model folder that holds the transformer: mostly the folder itself."""
    return folder / transformer_subfolder(Files(str(folder), False))


def inside(path: Any, name: str) -> str:
    """A module's path. Raises InputError if it is not inside the folder."""
    parts = PurePosixPath(str(path))
    if parts.is_absolute() or ".." in parts.parts:
        raise InputError(f"cannot use {MODULES} of {name}", f"'{path}' is not inside the folder", "correct that file")
    return "" if str(parts) == "." else str(parts)
