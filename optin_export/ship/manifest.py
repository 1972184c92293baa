"""manifest.json: the sha256 and size of every file of a run or of a shipped model, and what they were made from."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from optin_export.errors import InputError
from optin_export.files import read_json, sha256_file, write_json

NAME = "manifest.json"
#: A signature covers the manifest, so it cannot stand in it.
SIGNATURE = "model.sig"
#: What is in a folder but is not an artefact: it changes without the artefacts changing.
_NOT_ARTEFACTS = (
    "report.json",
    "report.html",
    NAME,
    SIGNATURE,
    "measure/deployed.json",
    "measure/perf_analyzer.json",
)


def artefacts(folder: Path) -> Iterator[Path]:
    """Every file below `folder` that belongs in its manifest."""
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder)
        # Hidden ones, and what workers left behind: logs and costs.
        hidden = any(part.startswith(".") for part in name.parts) or name.parts[0] == "cluster"
        if (path.is_file() or path.is_symlink()) and not hidden and name.as_posix() not in _NOT_ARTEFACTS:
            yield path


def write_manifest(folder: Path, facts: dict[str, Any]) -> dict[str, Any]:
    """Hash every artefact below `folder` and write manifest.json with `facts` (versions, hardware, seeds, verdict)."""
    files = {
        path.relative_to(folder).as_posix(): {"sha256": sha256_file(path), "bytes": path.stat().st_size}
        for path in artefacts(folder)
        if path.is_file()
    }
    manifest = {"version": 1, **facts, "files": files}
    write_json(folder / NAME, manifest)
    return manifest


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a run or a shipped model. Raises InputError if there is none that can be read."""
    try:
        manifest = read_json(folder / NAME)
        entries = manifest["files"].items()
        if not all(isinstance(entry["sha256"], str) and isinstance(entry["bytes"], int) for _, entry in entries):
            raise ValueError("a file has no sha256 or size")
        for name in ("environment", "inputs"):
            if not isinstance(manifest.get(name, {}), dict):
                raise ValueError(f"'{name}' is no mapping")
        if not isinstance(manifest.get("environment", {}).get("packages", {}), dict):
            raise ValueError("'environment.packages' is no mapping")
        return dict(manifest)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(
            f"cannot read {folder / NAME}",
            f"{type(error).__name__}: {error}"[:300],
            "give the folder of a finished run",
        ) from None


def add_files(folder: Path, paths: Sequence[Path]) -> None:
    """Enter files that came later into the manifest of `folder`; what it says of all others stays."""
    manifest = read_manifest(folder)
    for path in paths:
        entry = {"sha256": sha256_file(path), "bytes": path.stat().st_size}
        manifest["files"][path.relative_to(folder).as_posix()] = entry
    write_json(folder / NAME, manifest)


def check_manifest(folder: Path) -> list[str]:
    """Problems found when the files below `folder` are compared with its manifest; empty if all is as it was written.

    Found are changed, missing and extra files, and names that point outside. Raises InputError without a manifest.
    """
    files = read_manifest(folder)["files"]
    problems = []
    for name, entry in files.items():
        try:
            problem = _problem(folder, name, entry)
        except (OSError, ValueError, RuntimeError) as error:  # no name for a file, a loop of links, not permitted
            problem = f"cannot be read ({type(error).__name__})"
        if problem is not None:
            problems.append(f"{name}: {problem}")
    extra = [path.relative_to(folder).as_posix() for path in artefacts(folder)]
    return problems + [f"{name}: not in the manifest" for name in extra if name not in files]


def _problem(folder: Path, name: str, entry: dict[str, Any]) -> str | None:
    path = folder / name
    if not path.resolve().is_relative_to(folder.resolve()):
        return "points outside the folder"
    if not path.is_file():
        return "missing"
    if path.stat().st_size != entry["bytes"]:
        return f"has {path.stat().st_size} bytes, not {entry['bytes']}"
    return "content differs" if sha256_file(path) != entry["sha256"] else None


def run_of(folder: Path) -> str | None:
    """The identity of the run that a shipped model comes from; None where there is no manifest of ours."""
    try:
        run = read_manifest(folder).get("shipped_from")
        return run if isinstance(run, str) else None
    except InputError:
        return None


def content_of(folder: Path) -> dict[str, Any] | None:
    """What makes two shipped models equal: files and verdict, not when they were written. None without a manifest."""
    try:
        manifest = read_manifest(folder)
    except InputError:
        return None
    signed = (folder / SIGNATURE).is_file()
    return {"signed": signed} | {name: value for name, value in manifest.items() if name != "created"}
