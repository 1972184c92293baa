"""What may go from a finished run without the run being lost, and how much it frees; never anything outside it."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from optin_export.errors import EnvironmentLacks, InputError
from optin_export.workdir.run_directory import existing_run, is_run, leftovers

#: What can be kept of a run, and the places that belong to it; all else of ours goes with `clean`.
PARTS = {
    "report": (
        "recipe.yaml",
        "report.json",
        "report.html",
        "manifest.json",
        "plan/plan.json",
        "sweep.json",
        "compare.html",
    ),
    "model": ("model", "preprocess"),
    "onnx": ("onnx",),
    "engines": ("engines",),
    "measure": ("measure", "machines", "cluster"),
    "triton": ("triton",),
    "scores": ("scores", "plan/latency_table.json", ".shared"),
}
#: Everything a run or a sweep writes at its top. What a user put beside it is never touched.
_OURS = (
    "recipe.yaml",
    "report.json",
    "report.html",
    "manifest.json",
    "sweep.json",
    "compare.html",
    ".shared",
    ".stages",
    ".triton.optin-export",
    "cluster",
    "engines",
    "machines",
    "measure",
    "model",
    "onnx",
    "plan",
    "preprocess",
    "repaired",
    "scores",
    "triton",
)


@dataclass(frozen=True)
class RemovableFile:
    """A file or folder of a run that would go. path: relative to the run. bytes: what it frees."""

    run: Path
    path: str
    bytes: int


def runs_below(folder: Path) -> list[Path]:
    """The run folders directly in `folder`, or it itself where it is one. Links are not followed."""
    if not folder.is_dir():
        raise InputError(f"{folder} is no folder", "there is nothing to clean", "give a run, or the folder of runs")
    if is_run(folder):
        return with_sweep(folder)
    return [run for path in sorted(folder.iterdir()) if _is_own_run(path) for run in with_sweep(path)]


def with_sweep(run: Path) -> list[Path]:
    """The run; of a sweep first the runs in it. Links are not followed."""
    if run.is_symlink() or not (run / "sweep.json").is_file():
        return [run]
    return [*(path for path in sorted(run.iterdir()) if _is_own_run(path)), run]


def _is_own_run(path: Path) -> bool:
    return not path.is_symlink() and path.is_dir() and is_run(path)


def find(run: Path, keep: Sequence[str]) -> list[RemovableFile]:
    """What would go if only the parts in `keep` stay; with none kept, the whole run.

    Raises InputError for what is no run folder, or is only a link to one.
    """
    existing_run(run)
    if run.is_symlink():
        raise InputError(f"{run} is a link", "only what lies in a run folder itself is deleted", "name its real path")
    stays = {Path(place) for part in keep for place in PARTS[part]}
    found = []
    for path in _files(run):
        name = path.relative_to(run)
        if name.parts[0] in _OURS and not any(place == name or place in name.parents for place in stays):
            found.append(RemovableFile(run, name.as_posix(), 0 if path.is_symlink() else path.stat().st_size))
    known = {run / one.path for one in found}
    # What a killed process left goes in any case, out of the parts that stay as well.
    for path in leftovers(run):
        for file in _files(path) if path.is_dir() else [path]:
            if file not in known:
                found.append(RemovableFile(run, file.relative_to(run).as_posix(), file.lstat().st_size))
    return found


def over_limit(
    removable: Sequence[Sequence[RemovableFile]], limit: int, used: Sequence[int], order: Sequence[float]
) -> list[int]:
    """Which runs to clean, the oldest first, until all of them together take at most `limit` bytes.

    removable, used, order: per run what would go, the bytes it takes, and when it was last changed.
    """
    total, chosen = sum(used), []
    for index in sorted(range(len(used)), key=lambda index: order[index]):
        if total <= limit:
            break
        freed = sum(one.bytes for one in removable[index])
        if freed:
            chosen.append(index)
            total -= freed
    return chosen


def delete(removable: Sequence[RemovableFile]) -> None:
    """Delete them, and folders that are empty then. Raises EnvironmentLacks where that is not allowed."""
    try:
        for one in removable:
            (one.run / one.path).unlink(missing_ok=True)
        for run in {one.run for one in removable}:
            for place, _, _ in os.walk(run, topdown=False):
                inside = Path(place)
                if inside != run and inside.relative_to(run).parts[0] in _OURS and not any(inside.iterdir()):
                    inside.rmdir()
    except OSError as error:
        raise EnvironmentLacks(
            f"cannot delete {error.filename}",
            error.strerror or str(error),
            "check permissions; the same command goes on",
        ) from None


def remove_if_empty(run: Path) -> None:
    """A run of which nothing stays: its folder goes, where nothing of the user's lies in it."""
    if {path.name for path in run.iterdir()} <= {".stages"}:
        shutil.rmtree(run / ".stages", ignore_errors=True)
        run.rmdir()


def size(run: Path) -> int:
    """Bytes of the files in a run folder."""
    return sum(path.lstat().st_size for path in _files(run))


def _files(folder: Path) -> Iterator[Path]:
    """Every file, and every link as itself, below a folder; linked folders are not entered."""
    for place, folders, names in os.walk(folder):
        links = [name for name in folders if (Path(place) / name).is_symlink()]
        for name in sorted([*names, *links]):
            path = Path(place) / name
            if path.relative_to(folder).as_posix() != ".stages/lock":
                yield path
