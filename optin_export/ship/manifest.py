"""manifest.json: the sha256 and size of every artefact of a run, and what they were made from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from optin_export.errors import InputError
from optin_export.files import read_json, sha256_file, write_json

NAME = "manifest.json"
#: What is in a run folder but is not an artefact: it changes without the artefacts changing.
_NOT_ARTEFACTS = ("report.json", "report.html", NAME, "stages")


def write_manifest(run: Path, facts: dict[str, Any]) -> dict[str, Any]:
    """Hash every artefact below `run` and write manifest.json with `facts` (versions, hardware, seeds, recipe hash)."""
    files = {
        path.relative_to(run).as_posix(): {"sha256": sha256_file(path), "bytes": path.stat().st_size}
        for path in sorted(run.rglob("*"))
        if path.is_file() and path.relative_to(run).parts[0] not in _NOT_ARTEFACTS and not path.name.startswith(".")
    }
    manifest = {"version": 1, **facts, "files": files}
    write_json(run / NAME, manifest)
    return manifest


def check_manifest(run: Path) -> list[str]:
    """Problems found when the files below `run` are compared with its manifest; empty if all is as it was written.

    Raises InputError if there is no readable manifest.
    """
    try:
        files: dict[str, dict[str, Any]] = read_json(run / NAME)["files"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"cannot read {run / NAME}", f"{error}", "give the folder of a finished run") from None
    problems = []
    for name, entry in files.items():
        path = run / name
        if not path.resolve().is_relative_to(run.resolve()):
            problems.append(f"{name}: points outside the run folder")
        elif not path.is_file():
            problems.append(f"{name}: missing")
        elif sha256_file(path) != entry["sha256"]:
            problems.append(f"{name}: content differs")
    return problems
