"""Paths in a recipe are relative to its file; in a validated recipe they are absolute."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TypeVar

from optin_export.errors import InputError
from optin_export.recipe.schema import DataSource, Recipe

#: What a source may start with; "" is a bare path.
MODEL_PREFIXES = ("", "hf", "timm", "py")
_Data = TypeVar("_Data", bound=DataSource)
DATA_PREFIXES = ("csv", "tsv", "npz", "images", "wav", "hf-dataset", "py")


def with_absolute_paths(recipe: Recipe, folder: Path) -> Recipe:
    """The recipe with every path made absolute, looked up from `folder`; raises InputError for an unusable source."""
    model = recipe.model
    changes = {"source": absolute_source(model.source, folder, MODEL_PREFIXES)}
    if model.weights not in ("pretrained", "random"):
        changes["weights"] = _checkpoint(model.weights, folder)
    if model.tokenizer is not None and _find(model.tokenizer, folder).exists():
        changes["tokenizer"] = str(_find(model.tokenizer, folder))
    if model.family is not None:
        changes["family"] = str(_find(model.family, folder))
    if isinstance(model.classes, str):
        changes["classes"] = str(_find(model.classes, folder))
    data = recipe.data
    calibration = _absolute_data(data.calibration, folder)
    evaluation = None if data.evaluation is None else _absolute_data(data.evaluation, folder)
    if evaluation is not None and evaluation.metric.startswith("py:"):
        evaluation = evaluation.model_copy(update={"metric": absolute_source(evaluation.metric, folder, ("py",))})
    finetune = recipe.finetune
    if finetune is not None:
        tuned: dict[str, object] = {} if finetune.data is None else {"data": _absolute_data(finetune.data, folder)}
        if finetune.source is not None:
            tuned["source"] = absolute_source(finetune.source, folder, ("py",))
        finetune = finetune.model_copy(update=tuned)
    return recipe.model_copy(
        update={
            "finetune": finetune,
            "model": model.model_copy(update=changes),
            "data": data.model_copy(update={"calibration": calibration, "evaluation": evaluation}),
        }
    )


def _checkpoint(weights: str, folder: Path) -> str:
    """The path of `PATH` or `PATH#KEY` made absolute; a file whose own name has a # is that file."""
    path, mark, key = weights.rpartition("#")
    whole = _find(weights, folder)
    return f"{_find(path, folder)}#{key}" if mark and path and not whole.exists() else str(whole)


def _absolute_data(data: _Data, folder: Path) -> _Data:
    changes = {"source": absolute_source(data.source, folder, DATA_PREFIXES)}
    if data.label_folder is not None:
        changes["label_folder"] = str(_find(data.label_folder, folder))
    return data.model_copy(update=changes)


def absolute_source(source: str, folder: Path, prefixes: Sequence[str]) -> str:
    """`csv:train.csv` -> `csv:/where/the/recipe/is/train.csv`; hub names and module names stay as they are.

    A bare path gets no prefix. Raises InputError for an unknown prefix, or nothing after it.
    """
    prefix, separator, rest = source.partition(":")
    if not separator and "" in prefixes and source:
        return str(_find(source, folder))
    if prefix not in prefixes:
        known = ", ".join(f"{name}:" for name in prefixes if name)
        fix = "use one of these prefixes" + (", or the path of a folder" if "" in prefixes else "")
        raise InputError(f"unknown source '{source}'", f"it starts with none of {known}", fix)
    if not rest:
        raise InputError(f"cannot read the source '{source}'", "it names nothing", "name what to load")
    if prefix in ("csv", "tsv", "npz", "images", "wav"):
        return f"{prefix}:{_find(rest, folder)}"
    if prefix == "py":
        file, colon, function = rest.rpartition(":")
        if not colon or not function.isidentifier():
            raise InputError(f"cannot read the source '{source}'", "it names no function", "write py:FILE.py:FUNCTION")
        return f"py:{_find(file, folder)}:{function}" if file.endswith(".py") else source
    found = _find(rest, folder)
    return f"{prefix}:{found}" if found.exists() and prefix != "timm" else source


def _find(name: str, folder: Path) -> Path:
    """Relative to the recipe; where nothing is there, relative to the working directory (for `--set` on the shell)."""
    try:
        near_recipe = (folder / Path(name).expanduser()).resolve()
        here = Path(name).expanduser().resolve()
        return near_recipe if near_recipe.exists() or not here.exists() else here
    except (OSError, RuntimeError, ValueError) as error:  # an unknown ~user, a loop of links, a name too long
        raise InputError(f"cannot use the path '{name:.60}'", str(error)[:200], "correct the path") from None
