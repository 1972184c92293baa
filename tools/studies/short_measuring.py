"""`optin-export` with a few short blocks per latency measurement, for studies of what is written, not of how fast it
is: `python tools/studies/short_measuring.py` takes the words of `optin-export`.

The number of blocks is a constant of the package, not a field of a recipe. All else is the command itself.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from optin_export.cli import main

#: Constants of `optin_export.measure.latency`.
SHORT = {"BLOCKS": 5, "MAX_BLOCKS": 5, "PER_ROUND": 1, "BLOCK_SECONDS": 0.002, "WARM_UP_SECONDS": 0.01, "ATTEMPTS": 1}
#: The quickstart, smaller; no gate of it is about a time, so that every run ends with the same exit code.
SETTINGS = (
    "data.calibration.samples=64",
    "data.evaluation.samples=96",
    "prune.score_samples=8",
    "prune.curve_samples=8",
    "prune.probes=4",
    "export.batch=[1]",
    "gates.speedup=null",
)


def settings(*more: str) -> list[str]:
    """As words of the command line."""
    return [word for one in (*SETTINGS, *more) for word in ("--set", one)]


def command(arguments: Sequence[str]) -> int:
    from optin_export.measure import latency

    for name, value in SHORT.items():
        if not hasattr(latency, name):
            raise AttributeError(f"optin_export.measure.latency has no {name}")
        setattr(latency, name, value)
    return main(arguments)


if __name__ == "__main__":
    sys.exit(command(sys.argv[1:]))
