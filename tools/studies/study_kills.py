"""Runs and shipments killed with SIGKILL at random moments, and repeated: `python tools/studies/study_kills.py`.

The quickstart (smaller, short measurements: short_measuring.py) is killed at seeded moments: half spread evenly
over its whole duration, half at the first write after a moment, spread evenly over its stages. The same run is killed
several times, each time further on, before it is resumed to its end. `optin-export ship` is killed as it installs,
replaces models of another run, and repairs a damaged one: a third at moments spread evenly over its duration, a third
while it writes beside the repository, a third as soon as it begins to rename. After each kill it is repeated.

Whole process groups are killed. A quarter of the runs and a third of the shipments are the command itself; the others,
and what repeats them, are forked from a process that has imported everything (kills_forked.py). What comes out is
compared with undisturbed runs: every file byte for byte, but for times and what follows from them
(kills_compare.py). One core, about a quarter of an hour.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path

from kills_compare import contents, told
from kills_forked import warm_up
from kills_process import freeze
from kills_runs import kill_runs
from kills_runs import undisturbed as undisturbed_run
from kills_shipments import kill_shipments
from kills_shipments import undisturbed as undisturbed_shipments
from short_measuring import SETTINGS, SHORT

from optin_export.environment import describe
from optin_export.workdir.files import write_json

RESULT = Path(__file__).resolve().parents[2] / "docs" / "measurements" / "studies" / "kills.json"


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--kills", type=int, default=50, help="of runs")
    parser.add_argument("--shipments", type=int, default=50, help="kills of shipments")
    parser.add_argument("--series", type=int, default=7, help="kills of one run before it is let end")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=RESULT)
    options = parser.parse_args(arguments)
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="study-kills-") as name:
        place = Path(name)
        freeze(place)
        warm_up()
        whole, other = place / "whole", place / "other"
        lengths = undisturbed_run(whole, place)
        print(f"seconds of an undisturbed run: {[round(one, 1) for one in lengths]}", flush=True)
        undisturbed_run(other, place, "seed=1")
        runs = kill_runs(whole, place, lengths, options.kills, options.series, options.seed)
        steps = undisturbed_shipments((whole, other), place)
        print(f"seconds of shipments: {[(round(one.seconds, 1), round(one.writing, 3)) for one in steps]}", flush=True)
        shipments = kill_shipments(steps, place, options.shipments, options.seed)
        compared = {"run": told(contents(whole)), "shipment": told(contents(steps[1].after))}
    document = {
        "recipe": "quickstart",
        "settings": [*SETTINGS],
        "measuring": SHORT,
        "seed": options.seed,
        "kills_per_run": options.series,
        "run": runs,
        "shipment": shipments,
        "compared": compared,
        "seconds": round(time.monotonic() - began),
        "environment": describe(),
    }
    write_json(options.out, document)
    print(json.dumps({"run": runs, "shipment": shipments}, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
