"""report: everything the stages found out, verdict first, as report.json and a one-file report.html."""

from __future__ import annotations

from optin_export.report.compose import compose, head_repair, prunings
from optin_export.report.deployed import add_deployed, result_of, still_deployed
from optin_export.report.elsewhere import add_elsewhere, still_elsewhere
from optin_export.report.html import render_html
from optin_export.report.schema import Report, Size, StageResult

__all__ = [
    "Report",
    "Size",
    "StageResult",
    "add_deployed",
    "add_elsewhere",
    "compose",
    "head_repair",
    "prunings",
    "render_html",
    "result_of",
    "still_deployed",
    "still_elsewhere",
]
