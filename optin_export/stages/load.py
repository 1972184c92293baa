"""Stage `sources`: the model and the data are loaded, and what can be checked at once is."""

from __future__ import annotations

from optin_export.stages.checks import CHECKS
from optin_export.stages.context import RunContext
from optin_export.workdir.files import write_text


def load(work: RunContext) -> None:
    """Load and check everything that can be checked before hours of work and before anything is written."""
    for index, (_, check) in enumerate(CHECKS):
        check(work)
        work.tick(index + 1, len(CHECKS) + 1)
    write_text(work.folder / "recipe.yaml", work.recipe.to_yaml())
    work.tick(len(CHECKS) + 1, len(CHECKS) + 1)
