"""`optin-export families`: the known architectures; the units of all others are found by measurement."""

from __future__ import annotations

import json

from optin_export.cli._group import command


@command
def families(as_json: bool) -> int:
    """List the known families of architectures, with their units.

    The units of any other model are found by measurement when a run starts.
    """
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
    print("any other model   heads, neurons and channels, as found by measurement when a run starts")
    return 0
