"""Makes measurements short in every Python process that has this folder on PYTHONPATH: those that tests start.

Python imports a module of this name as it starts. The package itself is not imported before the process asks for it.
"""

from __future__ import annotations

import sys
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from typing import Any

from tests.shortly import SHORT

NAME = "optin_export.measure.latency"


class Shortly(MetaPathFinder):
    """Sets the constants of the measuring module right after it has been imported."""

    def find_spec(self, name: str, path: Any, target: Any = None) -> ModuleSpec | None:
        if name != NAME:
            return None
        spec = PathFinder.find_spec(name, path, target)
        assert spec is not None and spec.loader is not None
        execute = spec.loader.exec_module

        def exec_module(module: Any) -> None:
            execute(module)
            vars(module).update(SHORT)

        spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


sys.meta_path.insert(0, Shortly())
