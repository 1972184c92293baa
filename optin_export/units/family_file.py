"""Load a family that the user declares in a file of their own (`model.family` in a recipe)."""

from __future__ import annotations

import importlib.util
from collections.abc import Collection
from pathlib import Path

from optin_export.errors import InputError
from optin_export.units.declare import Family


def load_family(file: str | Path, known: Collection[str] = ()) -> Family:
    """Execute the Python file and return its FAMILY.

    known: names that are taken. Raises InputError if the file cannot be executed, or holds no usable FAMILY.
    """
    path = Path(file)
    try:
        spec = importlib.util.spec_from_file_location(path.stem, path)
        assert spec is not None and spec.loader is not None, "it is not a Python file"
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:  # the user's own code may raise anything
        text = next(iter(str(error).splitlines()), "")
        raise InputError(
            f"cannot load the family in {path}", f"{type(error).__name__}: {text}", "correct the file"
        ) from error
    family = getattr(module, "FAMILY", None)
    if not isinstance(family, Family):
        raise InputError(
            f"{path} declares no family",
            "it has no FAMILY" if family is None else f"FAMILY is a {type(family).__name__}",
            "set FAMILY = optin_export.units.Family(...) in it (docs/howto/family.md)",
        )
    if family.name in known or "+" in family.name or not family.name:
        why = "a family of this package has this name" if family.name in known else "it is empty or has a '+'"
        raise InputError(f"the family in {path} cannot be named '{family.name}'", why, "choose another name")
    return family
