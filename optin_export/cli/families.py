"""`optin-export families`: what can be pruned."""

from __future__ import annotations

import argparse
import json

EPILOG = "a recipe whose name is 'families': write ./families"


def add_arguments(parser: argparse.ArgumentParser) -> None: ...


def run(options: argparse.Namespace) -> int:
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
    if options.json:
        print(json.dumps({"families": rows}))
        return 0
    for row in rows:
        whole = f"; whole sub-layers of {' and '.join(row['sublayers'])}" if row["sublayers"] else ""
        print(f"{row['name']:<17} {row['library']:<13} {', '.join(row['units'])}{whole}")
        print(f"{'':<17} {row['examples']}")
    return 0
