"""The run folder: where it is, and the names of the stages that fill it."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from optin_export.errors import InputError
from optin_export.recipe import Recipe

#: In the order in which the pipeline runs them.
STAGES = ("sources", "scoring", "search", "surgery", "export", "engines", "measure", "ship", "report")


def run_folder(recipe: Recipe, out: str | Path | None) -> Path:
    """The run folder. Raises InputError if `out` is a file, or a folder that holds something else than a run."""
    folder = Path(out) if out is not None else Path("runs") / recipe.name
    try:
        if folder.exists() and not folder.is_dir():
            raise InputError(f"{folder} is a file", "a run needs a folder", "choose another --out")
        if folder.is_dir() and not is_run(folder) and any(path.name != ".stages" for path in folder.iterdir()):
            raise InputError(
                f"{folder} is not a run folder", "it holds other files", "name a new or empty folder with --out"
            )
    except (OSError, ValueError) as error:  # no permission, a name too long, a null byte
        raise InputError(f"cannot use {folder} as the run folder", str(error), "choose another --out") from None
    return folder


def is_run(folder: Path) -> bool:
    """Whether a run was begun in this folder."""
    return (folder / "recipe.yaml").is_file()


def existing_run(folder: Path) -> Path:
    """The folder, if a run was begun in it. Raises InputError."""
    try:
        found = is_run(folder)
    except (OSError, ValueError):
        found = False
    if not found:
        raise InputError(f"{folder} is not a run folder", "it has no recipe.yaml", "give the folder of a finished run")
    return folder


def leftovers(folder: Path) -> list[Path]:
    """What a killed process left half-written in a run folder: nobody else may be at work there."""
    found = [folder / "plan" / ".trials", *(folder / ".triton.optin-export").glob("staging-*")]
    found = [path for path in found if path.is_dir() and not path.is_symlink()]
    for place, _, names in os.walk(folder):  # does not follow links
        found += [Path(place) / name for name in names if name.startswith(".tmp-")]
    return found


def clear_leftovers(folder: Path) -> None:
    for path in leftovers(folder):
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)
