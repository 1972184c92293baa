"""`optin-export rollback`: restore the models that the last shipment replaced."""

from __future__ import annotations

import json
from pathlib import Path

import click

from optin_export.cli._group import PATH, command


@command
@click.argument("repository", type=PATH, metavar="DIR")
@click.argument("name")
def rollback(repository: Path, name: str, as_json: bool) -> int:
    """Restore the version that the last shipment replaced.

    DIR is the model repository, NAME a model in it. Models that were shipped together are restored together. A second
    rollback undoes the first.
    """
    from optin_export.ship.repository import roll_back

    names = roll_back(repository, name)
    if as_json:
        print(json.dumps({"repository": str(repository), "models": names}))
    else:
        print("\n".join(f"{repository / name}: restored" for name in names))
        print("a server in poll mode loads it by itself; otherwise reload the model or restart the server")
    return 0
