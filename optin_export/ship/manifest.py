"""manifest.json: the sha256 and size of every file of a run or of a shipped model, and their origin."""

from __future__ import annotations

import contextlib
import os
import re
import stat
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from optin_export.errors import InputError
from optin_export.workdir.files import HALF_WRITTEN, read_json, sha256_file, write_json

NAME = "manifest.json"
#: A signature covers the manifest, so it cannot be part of it.
SIGNATURE = "model.sig"
#: Files written after a run's manifest and entered into it then; in runs of earlier versions they have no entry.
_LATER = (
    "report.json",
    "report.html",
    "measure/deployed.json",
    "measure/footprint.json",
    "measure/perf_analyzer.json",
    "measure/serving.json",
)
#: Entries of a run folder that change without the run changing, or exist only while a process works in it. They are
#: not hashed, but what they may contain is still checked (`strangers`).
_WORKING = {
    ".stages": re.compile(r"lock|[\w.@+-]+\.json"),
    "cluster": re.compile(r"[\w.@+-]+\.(log|json)|shards(/.*)?"),
    ".triton.optin-export": re.compile(r"lock|previous(/.*)?"),
}


def artefacts(folder: Path) -> Iterator[Path]:
    """Every file below `folder` that belongs in its manifest."""
    for path, mode in sorted(_entries(folder)):
        if stat.S_ISREG(mode):
            yield path


def _entries(folder: Path) -> Iterator[tuple[Path, int]]:
    """Everything below `folder` except manifest, signature and a run's working folders, as (path, its own mode)."""
    is_run = (folder / "recipe.yaml").is_file()
    for place, folders, names in os.walk(folder):
        if Path(place) == folder:
            names = [name for name in names if name not in (NAME, SIGNATURE) or not _is_plain(folder / name)]
            if is_run:
                folders[:] = [name for name in folders if name not in _WORKING or (folder / name).is_symlink()]
        folders.sort()
        for name in sorted([*folders, *names]):
            path = Path(place) / name
            with contextlib.suppress(FileNotFoundError):
                yield path, path.lstat().st_mode


def strangers(folder: Path, files: Collection[str]) -> list[str]:
    """Entries below `folder` that are not in its manifest: files (also hidden ones), folders without any listed file,
    links and special files. files: names in the manifest. Each as "NAME: what is wrong"."""
    known = {parent.as_posix() for name in files for parent in PurePosixPath(name).parents}
    problems = []
    for path, mode in sorted(_entries(folder)):
        name = path.relative_to(folder).as_posix()
        if stat.S_ISDIR(mode):
            if name not in known:
                problems.append(f"{name}: a folder that is not in the manifest")
        elif name not in files:
            problems.append(f"{name}: not in the manifest" if stat.S_ISREG(mode) else f"{name}: {_kind(mode)}")
        elif not stat.S_ISREG(mode) and _stays_in(path, folder):
            problems.append(f"{name}: {_kind(mode)}")  # for links to the outside, the file itself is reported
    if (folder / "recipe.yaml").is_file():
        problems += [problem for name in _WORKING for problem in _strange_work(folder, name)]
    return problems


def _stays_in(path: Path, folder: Path) -> bool:
    try:
        return path.resolve().is_relative_to(folder.resolve())
    except (OSError, RuntimeError):  # a loop of links
        return False


def _strange_work(folder: Path, name: str) -> Iterator[str]:
    place = folder / name
    if place.is_symlink() or not place.is_dir():
        return  # a link was seen by `_entries`
    for path in sorted(place.rglob("*")):
        inside, mode = path.relative_to(place).as_posix(), path.lstat().st_mode
        if not _WORKING[name].fullmatch(inside) or HALF_WRITTEN.fullmatch(path.name):
            yield f"{name}/{inside}: not of this package"
        elif not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):
            yield f"{name}/{inside}: {_kind(mode)}"


def _is_plain(path: Path) -> bool:
    return stat.S_ISREG(path.lstat().st_mode)


def _kind(mode: int) -> str:
    return "a link" if stat.S_ISLNK(mode) else "no regular file"


def write_manifest(folder: Path, facts: dict[str, Any]) -> dict[str, Any]:
    """Hash every artefact below `folder` and write manifest.json with `facts` (versions, hardware, seeds, verdict)."""
    files = {
        path.relative_to(folder).as_posix(): {"sha256": sha256_file(path), "bytes": path.stat().st_size}
        for path in artefacts(folder)
    }
    manifest = {"version": 1, **facts, "files": files}
    write_json(folder / NAME, manifest)
    return manifest


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a run or a shipped model. Raises InputError if there is no readable one."""
    try:
        manifest = read_json(folder / NAME)
        entries = manifest["files"].items()
        if not all(isinstance(entry["sha256"], str) and isinstance(entry["bytes"], int) for _, entry in entries):
            raise ValueError("a file has no sha256 or size")
        for name in ("environment", "inputs"):
            if not isinstance(manifest.get(name, {}), dict):
                raise ValueError(f"'{name}' is not a mapping")
        if not isinstance(manifest.get("environment", {}).get("packages", {}), dict):
            raise ValueError("'environment.packages' is not a mapping")
        return dict(manifest)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(
            f"cannot read {folder / NAME}",
            f"{type(error).__name__}: {error}"[:300],
            "give the folder of a finished run",
        ) from None


def add_files(folder: Path, paths: Sequence[Path]) -> None:
    """Enter files that were added or changed later into the manifest of `folder`, without changing other entries."""
    manifest = read_manifest(folder)
    for path in paths:
        entry = {"sha256": sha256_file(path), "bytes": path.stat().st_size}
        manifest["files"][path.relative_to(folder).as_posix()] = entry
    write_json(folder / NAME, manifest)


def is_as_written(path: Path, entry: Mapping[str, Any]) -> bool:
    """Whether a file matches a manifest's entry; a file of another size is not read."""
    return path.is_file() and path.stat().st_size == entry["bytes"] and sha256_file(path) == entry["sha256"]


def add_reports(run: Path, *others: Path) -> None:
    """Enter a run's current report.json and report.html, and other files that were written with them."""
    add_files(run, [run / "report.json", run / "report.html", *others])


def check_manifest(folder: Path) -> list[str]:
    """Compare the files below `folder` with its manifest; returns the problems found, empty if nothing changed.

    Detects changed, missing and extra files, folders and links, special files, and names that point outside.
    Raises InputError if there is no manifest.
    """
    manifest = read_manifest(folder)
    files, problems = manifest["files"], []
    for name, entry in files.items():
        try:
            problem = _problem(folder, name, entry)
        except (OSError, ValueError, RuntimeError) as error:  # an invalid file name, a loop of links, or not permitted
            problem = f"cannot be read ({type(error).__name__})"
        if problem is not None:
            problems.append(f"{name}: {problem}")
    return problems + strangers(folder, files if "shipped_from" in manifest else {**dict.fromkeys(_LATER), **files})


def is_whole(folder: Path) -> bool:
    """Whether a folder has a manifest and its content matches it."""
    try:
        return not check_manifest(folder)
    except InputError:
        return False


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
    """The identity of the run that a shipped model comes from; None without a manifest of this package."""
    try:
        run = read_manifest(folder).get("shipped_from")
        return run if isinstance(run, str) else None
    except InputError:
        return None


def content_of(folder: Path) -> dict[str, Any] | None:
    """The content by which shipped models are compared: files and verdict, not dates. None without a manifest."""
    try:
        manifest = read_manifest(folder)
    except InputError:
        return None
    signed = (folder / SIGNATURE).is_file()
    return {"signed": signed} | content_of_manifest(manifest)


def content_of_manifest(manifest: Mapping[str, Any]) -> dict[str, Any]:
    """What stays the same when the same run is shipped again: load time and memory differ at every measurement."""
    return {name: value for name, value in manifest.items() if name not in ("created", "instance")}
