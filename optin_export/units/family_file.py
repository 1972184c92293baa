"""Load a family that the user declares in a file of their own (`model.family` in a recipe)."""

from __future__ import annotations

import dataclasses
import importlib.util
import sys
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any

from torch import nn

from optin_export.errors import InputError
from optin_export.units.declare import Family, Refusal, UnitGroup


def load_family(file: str | Path, known: Collection[str] = ()) -> Family:
    """Execute the Python file and return its FAMILY.

    known: names that are taken. Raises InputError if the file cannot be executed, or holds no usable FAMILY.
    """
    path = Path(file)
    try:
        spec = importlib.util.spec_from_file_location(f"optin_family_{path.stem}", path)
        assert spec is not None and spec.loader is not None, "it is not a Python file"
        module = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = module  # dataclasses look their module up
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
    return _guarded(family, path)


def _guarded(family: Family, file: Path) -> Family:
    """The family, whose functions raise only InputErrors, and whose groups name only modules of their block."""

    def guarded(name: str) -> Callable[..., Any] | None:
        function: Callable[..., Any] | None = getattr(family, name)
        if function is None:
            return None

        def call(*args: Any) -> Any:
            try:
                result = function(*args)
                if name == "groups":
                    _check_names(result, *args)
                return result
            except InputError:
                raise
            except Exception as error:  # the user's own code may raise anything
                where = f" for '{args[1]}'" if name in ("groups", "chain") else ""
                raise InputError(
                    f"`{name}` of the family {family.name} fails{where}",
                    f"{type(error).__name__}: {error}"[:300],
                    f"correct it in {file}",
                ) from error

        return call

    names = ("is_block", "groups", "chain", "streams", "refusals", "tokens")
    functions: dict[str, Any] = {name: guarded(name) for name in names}
    return dataclasses.replace(family, **functions)


def _check_names(groups: Any, block: nn.Module, path: str, index: int) -> None:
    """Raises TypeError or AttributeError for what is no group, or names a module that the block does not have."""
    for group in groups:
        if isinstance(group, Refusal):
            continue
        if not isinstance(group, UnitGroup):
            raise TypeError(f"it returns a {type(group).__name__}, not only UnitGroups and Refusals")
        for name in _modules_of(group):
            if name.startswith(f"{path}."):
                block.get_submodule(name.removeprefix(f"{path}."))
        for attribute, _ in group.sizes:
            if attribute.startswith(f"{path}."):
                _check_attribute(block, attribute.removeprefix(f"{path}."))


def _check_attribute(target: Any, attribute: str) -> None:
    for part in attribute.split("."):
        if part.isdigit() and isinstance(target, tuple):
            return
        target = getattr(target, part)


def _modules_of(group: UnitGroup) -> Iterator[str]:
    yield from (*(one.path for one in group.producers), *group.reads, *(path for path, _ in group.bypass))
    yield from (one.norm for one in group.producers if one.norm is not None)
    yield from (one.path.rpartition(".")[0] for one in group.tables)
    yield from (one for one in (group.sublayer, group.residual and group.residual[0]) if one)
