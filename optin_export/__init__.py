"""optin_export: make a trained transformer smaller without retraining, and ship engines whose speedup is measured.

import optin_export
report = optin_export.run("recipes/quickstart.yaml", out="runs/quickstart")
print(report.verdict.passed)
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
__all__ = ["Report", "__version__", "load_model", "run"]

if TYPE_CHECKING:
    from optin_export.pruning.checkpoint import load_model
    from optin_export.report.schema import Report
    from optin_export.stages.pipeline import run


def __getattr__(name: str) -> Any:
    # Lazy: `optin-export --dry-run` and `--help` must not wait seconds for torch.
    if name == "run":
        from optin_export.stages.pipeline import run

        return run
    if name == "Report":
        from optin_export.report.schema import Report

        return Report
    if name == "load_model":
        from optin_export.pruning.checkpoint import load_model

        return load_model
    raise AttributeError(f"module 'optin_export' has no attribute {name!r}")
