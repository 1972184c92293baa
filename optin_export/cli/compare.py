"""`optin-export compare`: finished runs side by side on one page."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

EPILOG = "exit code 0: the page is written, whatever the verdicts; 2: not two or more finished runs"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("runs", metavar="RUN", type=Path, nargs="+", help="the folders of finished runs, two or more")
    parser.add_argument(
        "--out", metavar="FILE", type=Path, default=Path("compare.html"), help="the page (default: compare.html)"
    )


def run(options: argparse.Namespace) -> int:
    from optin_export.errors import InputError
    from optin_export.report.compare import compare

    if options.out.is_dir():
        raise InputError(f"cannot write {options.out}", "it is a folder", "name a file, e.g. --out compare.html")
    found = compare(options.runs, options.out)
    if options.json:
        print(json.dumps(found.to_json()))
        return 0
    for warning in found.warnings:
        print(f"note: {warning}")
    for group in found.groups:
        for front in group.fronts:
            best = ", ".join(f"{one.label} ({one.accuracy:.2f} at {one.cost:.3g} ms)" for one in _best(front.points))
            print(f"{front.title} on {front.machine}: on the front of {group.metric} and p50: {best}")
        for label, why in group.unmeasured.items():
            print(f"{label}: on no front: {why}")
    print(f"page: {options.out}")
    return 0


def _best(points):  # type: ignore[no-untyped-def]
    return sorted((one for one in points if one.front), key=lambda one: one.cost)
