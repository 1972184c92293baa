"""`optin-export verify`: is everything as it was written?"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

EPILOG = "exit code 0: all as written; 2: something differs, is missing or too much, or there is no manifest"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", metavar="DIR", type=Path, help="a run, a model repository, or one of its models")
    parser.add_argument("--key", metavar="PEM", type=Path, help="public key: check the models' signatures as well")


def run(options: argparse.Namespace) -> int:
    from optin_export.ship.verify import check_folder

    found = check_folder(options.folder, options.key)
    problems = [f"{place}/{problem}" for place, some in found.items() for problem in some]
    if options.json:
        print(json.dumps({"folder": str(options.folder), "checked": sorted(found), "problems": problems}))
    elif problems:
        print("\n".join(problems))
    else:
        print(f"{options.folder}: {', '.join(sorted(found))}: every file is as it was written")
    return 2 if problems else 0
