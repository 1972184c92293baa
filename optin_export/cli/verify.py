"""`optin-export verify`: compare files with their manifest."""

from __future__ import annotations

import json
from pathlib import Path

import click

from optin_export.cli._group import PATH, command


@command
@click.argument("folder", type=PATH, metavar="DIR")
@click.option("--key", type=PATH, metavar="PEM", help="A public key: check the signatures of models as well.")
def verify(folder: Path, key: Path | None, as_json: bool) -> int:
    """Check the files of a run or of a model repository.

    DIR is a run folder, a model repository, or the folder of one model in it. Every file is compared with the sha256 in
    manifest.json.

    Exit code 0: all files are as they were written; 2: a file is different, missing or added, or there is no manifest.
    """
    from optin_export.ship.verify import check_folder

    found = check_folder(folder, key)
    problems = [f"{place}/{problem}" for place, some in found.items() for problem in some]
    if as_json:
        print(json.dumps({"folder": str(folder), "checked": sorted(found), "problems": problems}))
    elif problems:
        print("\n".join(problems))
    else:
        print(f"{folder}: {', '.join(sorted(found))}: every file is as it was written")
    return 2 if problems else 0
