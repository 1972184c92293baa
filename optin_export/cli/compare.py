"""`optin-export compare`: finished runs side by side on one page."""

from __future__ import annotations

import json
from pathlib import Path

import click

from optin_export.cli._group import PATH, command
from optin_export.errors import InputError, printable


@command
@click.argument("runs", type=PATH, metavar="RUN...", nargs=-1, required=True)
@click.option("--out", type=PATH, metavar="FILE", default="compare.html", help="The page (default: compare.html).")
def compare(runs: tuple[Path, ...], out: Path, as_json: bool) -> int:
    """Write a page that compares finished runs.

    Give the folders of two or more runs. The page marks the runs that no other beats in both accuracy and latency.

    Exit code 0: the page is written, whatever the verdicts are; 2: there are fewer than two finished runs.
    """
    from optin_export.report.compare import compare as compare_runs

    if out.is_dir():
        raise InputError(f"cannot write {out}", "it is a folder", "name a file, e.g. --out compare.html")
    found = compare_runs(runs, out)
    if as_json:
        print(json.dumps(found.to_json()))
        return 0
    for warning in found.warnings:
        print(f"note: {warning}")
    for group in found.groups:
        for front in group.fronts:
            best = sorted((one for one in front.points if one.front), key=lambda one: one.cost)
            points = ", ".join(f"{one.label} ({one.accuracy:.2f} at {one.cost:.3g} ms)" for one in best)
            print(f"{front.title} on {front.machine}: on the front of {group.metric} and p50: {points}")
        for label, why in group.unmeasured.items():
            print(f"{label}: on no front: {why}")
        for run in group.runs:
            for text in run.report.warnings:
                print(printable(f"{run.label}: warning: {text}"))
    print(f"page: {out}")
    return 0
