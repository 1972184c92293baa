"""Names of a package that are imported on first use.

Commands that only read what a run has written (`verify`, `check` ...) must not wait seconds for torch, although their
packages also hold code that needs it.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from typing import Any


def names(package: str, where: Mapping[str, str]) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """`__getattr__` and `__dir__` of a package. where: module of the package -> names in it, separated by blanks.

    None may have the name of a module of the package, which Python would put in its place.
    """
    modules = {name: module for module, some in where.items() for name in some.split()}

    def get(name: str) -> Any:
        if name not in modules:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        return getattr(importlib.import_module(f"{package}.{modules[name]}"), name)

    return get, lambda: sorted(modules)
