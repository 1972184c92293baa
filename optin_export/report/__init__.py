"""Write the stages' results, verdict first, as report.json and a self-contained report.html."""

from __future__ import annotations

from typing import TYPE_CHECKING

from optin_export import lazy

if TYPE_CHECKING:
    from optin_export.report.compose import chance_warnings, head_repair, output_refit, prunings
    from optin_export.report.deployed import add_deployed, result_of, still_deployed
    from optin_export.report.elsewhere import add_elsewhere, still_elsewhere
    from optin_export.report.fleet import COSTS, FLEET, costs_of, fleet_gates, still_spent
    from optin_export.report.html import found_by, render_html
    from optin_export.report.schema import Report, Size, StageResult

__all__ = [
    "COSTS",
    "FLEET",
    "Report",
    "Size",
    "StageResult",
    "add_deployed",
    "add_elsewhere",
    "chance_warnings",
    "costs_of",
    "fleet_gates",
    "found_by",
    "head_repair",
    "output_refit",
    "prunings",
    "render_html",
    "result_of",
    "still_deployed",
    "still_elsewhere",
    "still_spent",
]

__getattr__, __dir__ = lazy.names(
    __name__,
    {
        "compose": "chance_warnings head_repair output_refit prunings",
        "deployed": "add_deployed result_of still_deployed",
        "elsewhere": "add_elsewhere still_elsewhere",
        "fleet": "COSTS FLEET costs_of fleet_gates still_spent",
        "html": "found_by render_html",
        "schema": "Report Size StageResult",
    },
)
