"""Stage `sources`: load the model and the data, and run all checks that are possible at the start."""

from __future__ import annotations

from optin_export.progress import advance, phase, task
from optin_export.stages.checks import CHECKS
from optin_export.stages.context import RunContext
from optin_export.workdir.files import write_text


def load(work: RunContext) -> None:
    """Load and check everything that can be checked before hours of work and before anything is written."""
    with task(len(CHECKS) + 1):
        for name, check in CHECKS:
            phase(name)
            check(work)
            advance()
        write_text(work.folder / "recipe.yaml", work.recipe.to_yaml())
        advance()
