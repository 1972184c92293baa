"""What scoring takes, for forecasts."""

from __future__ import annotations

from collections.abc import Mapping

from optin_export.recipe import PruneSection
from optin_export.scoring.optin import SUSPECT_ROWS, SUSPECTS
from optin_export.scoring.sketch import CHUNK
from optin_export.units import Effort, Structure, later_share

#: Probes that `probes: auto` takes on most models.
USUAL_PROBES = 16


def effort(structure: Structure, config: PruneSection, methods: Mapping[str, str], rows: int) -> Effort:
    """The effort of scoring `rows` rows. methods: group -> its scorer; of a user's own scorer nothing is known."""
    total, used = Effort(), set(methods.values())
    if used & {"activation"}:
        total += Effort(forward=2 * rows)
    if not used & {"optin", "optin-exact"}:
        return total
    total += Effort(forward=rows)
    for group in structure.groups:
        if methods[group.key] == "optin":
            masked = min(group.count, SUSPECTS) * SUSPECT_ROWS
            total += Effort(forward=rows * masked * later_share(structure, group))
        elif methods[group.key] == "optin-exact":
            total += Effort(forward=rows * group.count * later_share(structure, group))
    if "optin" in used:
        probes = USUAL_PROBES if config.probes == "auto" else config.probes
        # Both terms apart in the first chunk, then their sum; sizes of contributions.
        total += Effort(forward=2 * rows, graph=rows * (1 + probes / CHUNK), backward=rows * (2 * CHUNK + probes))
    return total
