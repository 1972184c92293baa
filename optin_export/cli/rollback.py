"""`optin-export rollback`: what the last shipment replaced comes back."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

EPILOG = "the models that were shipped together go back together; a second rollback undoes the first"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("repository", metavar="DIR", type=Path, help="the model repository")
    parser.add_argument("name", metavar="NAME", help="the model")


def run(options: argparse.Namespace) -> int:
    from optin_export.ship.repository import roll_back

    names = roll_back(options.repository, options.name)
    if options.json:
        print(json.dumps({"repository": str(options.repository), "models": names}))
    else:
        print("\n".join(f"{options.repository / name}: put back" for name in names))
        print("a server in poll mode takes it up by itself; otherwise reload the model or restart the server")
    return 0
