"""The run folder: where it is, and the names of the stages that fill it."""

from __future__ import annotations

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
        if folder.is_dir() and any(folder.iterdir()) and not (folder / "recipe.yaml").exists():
            raise InputError(
                f"{folder} is not a run folder", "it holds other files", "name a new or empty folder with --out"
            )
    except (OSError, ValueError) as error:  # no permission, a name too long, a null byte
        raise InputError(f"cannot use {folder} as the run folder", str(error), "choose another --out") from None
    return folder
