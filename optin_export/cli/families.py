"""`optin-export families`: the architectures that can be pruned."""

from __future__ import annotations

import json

from optin_export.cli._group import command


@command
def families(as_json: bool) -> int:
    """List the architectures that can be pruned, with their units."""
    from optin_export.units import supported

    rows = [
        {
            "name": family.name,
            "library": family.library,
            "examples": family.examples,
            "units": list(family.units),
            "sublayers": list(family.sublayers),
        }
        for family in supported()
    ]
    if as_json:
        print(json.dumps({"families": rows}))
        return 0
    for row in rows:
        whole = f"; whole sub-layers of {' and '.join(row['sublayers'])}" if row["sublayers"] else ""
        print(f"{row['name']:<17} {row['library']:<13} {', '.join(row['units'])}{whole}")
        print(f"{'':<17} {row['examples']}")
    return 0
