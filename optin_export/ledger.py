"""What has been done in a run folder, by content: a step is skipped only if what it was made from is unchanged.

This is the only cache of results there is. What it finds damaged is made again, and said.
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from optin_export.files import atomic_path, read_json, sha256_file, sha256_json, write_json

ROOMS = (
    "recipe",
    "sources",
    "families",
    "scoring",
    "search",
    "surgery",
    "export",
    "engines",
    "measure",
    "ship",
    "report",
)
FOLDER = ".stages"
#: Outside the rooms, and part of every step all the same: they decide what a step reads and writes.
_COMMON = ("steps", "workspace.py")
#: Steps whose results sibling runs of a sweep take over: they are the same for many, and the longest.
SHARED = ("scoring", "scoring.curves", "export.base", "export.program.base")
RECORD = "step.json"


@lru_cache
def code_hash(room: str) -> str:
    """Hash of the source of a room, of all rooms before it and of the steps: what code a step can depend on."""
    package = Path(__file__).parent
    total = hashlib.sha256()
    for name in (*ROOMS[: ROOMS.index(room) + 1], *_COMMON):
        for file in sorted((package / name).rglob("*.*")) if (package / name).is_dir() else [package / name]:
            if file.is_file() and file.suffix in (".py", ".j2"):
                total.update(f"{file.relative_to(package)}".encode() + file.read_bytes())
    return total.hexdigest()


def _copy(source: Path, path: Path) -> None:
    """The file, whole or not at all; nothing where there is no source."""
    if source.is_file():
        with atomic_path(path) as temporary:
            shutil.copyfile(source, temporary)


class Ledger:
    """The steps done in one run folder. `changed` is called once, before the first step that is not reused.

    warn: is told, in one line, what the user should know, such as a result that was damaged. warnings: those lines.
    shared: a folder in which sibling runs leave the steps named in SHARED for each other, by their key.
    """

    def __init__(
        self,
        run: Path,
        force: bool,
        changed: Callable[[], None],
        warn: Callable[[str], None] = lambda text: None,
        shared: Path | None = None,
    ) -> None:
        self.run, self.force, self._changed, self._warn, self.shared = run, force, changed, warn, shared
        self.executed, self._told = 0, False
        self.warnings: list[str] = []

    def step(
        self,
        room: str,
        name: str,
        inputs: Mapping[str, Any],
        outputs: Sequence[Path],
        work: Callable[[], dict[str, Any]],
    ) -> dict[str, Any]:
        """Result of `work`, which writes `outputs`; from the last time if inputs, code and outputs are unchanged.

        inputs: JSON-serialisable, with files given by their hash (`sha256_file`).
        """
        key = sha256_json({"name": name, "inputs": inputs, "code": code_hash(room)})
        record = self.run / FOLDER / f"{name}.json"
        if not self.force and (result := self._reuse(record, key)) is not None:
            return result
        if not self._told:
            self._changed()
            self._told = True
        shared = self.shared / key[:32] if self.shared is not None and name in SHARED else None
        if shared is not None and not self.force:
            for path in outputs:
                _copy(shared / path.relative_to(self.run), path)
            _copy(shared / RECORD, record)
            if (result := self._reuse(record, key)) is not None:
                return result
        self.executed += 1
        result = work()
        files = {path.relative_to(self.run).as_posix(): sha256_file(path) for path in outputs}
        write_json(record, {"key": key, "files": files, "result": result})
        if shared is not None:
            for path in outputs:
                _copy(path, shared / path.relative_to(self.run))
            _copy(record, shared / RECORD)  # last: without it nothing is taken
        return result

    def _reuse(self, record: Path, key: str) -> dict[str, Any] | None:
        name = record.relative_to(self.run).as_posix()
        try:
            entry = read_json(record)
            same, files, result = entry["key"] == key, dict(entry["files"]), dict(entry["result"])
        except FileNotFoundError:
            return None
        except (OSError, ValueError, KeyError, TypeError) as error:
            self.warn(f"{name} cannot be read ({type(error).__name__}); its step is done again")
            return None
        if not same:
            return None
        for output, digest in files.items():
            try:
                found = sha256_file(self.run / output)
            except OSError as error:
                self.warn(f"{output} cannot be read ({error.strerror}); it is made again")
                return None
            if found != digest:
                self.warn(f"{output} is not what was written (its sha256 is another); it is made again")
                return None
        return result

    def warn(self, text: str) -> None:
        """Say a line at once, and again in the report."""
        self.warnings.append(text)
        self._warn(text)
