"""optin_export: make a trained transformer smaller without retraining, and ship engines whose speedup is measured.

import optin_export as oe
small = oe.prune(model, batches, macs=0.5)  # a torch module, and batches of what it takes
small.model, small.report, small.save("small"), small.to_onnx("small.onnx")

report = oe.run("recipes/quickstart.yaml", out="runs/quickstart")  # the whole way of the command line
print(report.verdict.passed)
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
__all__ = ["Pruned", "Report", "__version__", "errors", "load_model", "prune", "run"]

if TYPE_CHECKING:
    from optin_export import errors
    from optin_export.api import Pruned, prune
    from optin_export.pruning.checkpoint import load_model
    from optin_export.report.schema import Report
    from optin_export.stages.pipeline import run

#: Lazy: `optin-export --dry-run` and `--help` must not wait seconds for torch.
_WHERE = {
    "Pruned": "api",
    "Report": "report.schema",
    "load_model": "pruning.checkpoint",
    "prune": "api",
    "run": "stages.pipeline",
}


def __getattr__(name: str) -> Any:
    if name in _WHERE:
        return getattr(importlib.import_module(f"{__name__}.{_WHERE[name]}"), name)
    if name == "errors":
        return importlib.import_module(f"{__name__}.errors")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
