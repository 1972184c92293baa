"""Makes measurements short, and exports shared, in every Python process that has this folder on PYTHONPATH.

Those are processes that tests start. Python imports a module of this name as it starts. The package itself is not
imported before the process asks for it.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from typing import Any

from tests.exported_once import FOLDER, sharing
from tests.shortly import SHORT


def _measure_shortly(module: Any) -> None:
    vars(module).update(SHORT)


def _export_once(module: Any) -> None:
    if FOLDER in os.environ:
        module.export_onnx = sharing(module.export_onnx, Path(os.environ[FOLDER]))


#: Module -> what is done with it right after it has been imported.
CHANGES: dict[str, Callable[[Any], None]] = {
    "optin_export.measure.latency": _measure_shortly,
    "optin_export.stages.export": _export_once,
}


class Changing(MetaPathFinder):
    """Carries out the changes."""

    def find_spec(self, name: str, path: Any, target: Any = None) -> ModuleSpec | None:
        if name not in CHANGES:
            return None
        spec = PathFinder.find_spec(name, path, target)
        assert spec is not None and spec.loader is not None
        execute = spec.loader.exec_module

        def exec_module(module: Any) -> None:
            execute(module)
            CHANGES[name](module)

        spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


sys.meta_path.insert(0, Changing())
