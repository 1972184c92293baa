"""`optin-export ship`: a finished run into a Triton model repository."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

EPILOG = "a run that failed its gates is refused (exit code 4); nothing is ever half-written"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", metavar="RUN", type=Path, help="the folder of a finished run")
    parser.add_argument("--to", metavar="DIR", type=Path, required=True, help="the model repository")
    parser.add_argument("--name", help="what the model is called there (default: the recipe's name)")
    parser.add_argument(
        "--set", action="append", default=[], metavar="SHIP.B=C", help="override a field of the recipe's section ship"
    )
    parser.add_argument("--allow-failed", action="store_true", help="ship a run that failed; the manifest says so")
    parser.add_argument("--replace", action="store_true", help="overwrite models of another run")
    parser.add_argument("--wait", action="store_true", help="for another process that works in the run folder")
    parser.add_argument("--bom", action="store_true", help="with a CycloneDX bill of materials per model")
    parser.add_argument("--sign-key", metavar="PEM", type=Path, help="sign each model (extra: signing)")


def run(options: argparse.Namespace) -> int:
    from optin_export import ship
    from optin_export.ship.config import check_name
    from optin_export.ship.guide import rollout
    from optin_export.workdir.lock import held
    from optin_export.workdir.run_directory import existing_run

    existing_run(options.run)
    if options.name is not None:
        check_name(options.name)
    with held(options.run, "optin-export ship", options.wait):
        origin = ship.Origin.from_run(options.run, options.set)
        ship.check_tools()
        origin.check(ship.files_of(origin), options.allow_failed)
        shipped = ship.ship_models(
            origin, options.to, options.name, replace=options.replace, bom=options.bom, key=options.sign_key
        )
    if options.json:
        described = {"repository": str(shipped.repository), "models": shipped.names, "changed": shipped.changed}
        print(json.dumps({**described, "image": shipped.image, "passed": origin.passed}))
        return 0
    for name in shipped.names:
        print(f"{shipped.repository / name}: {'written' if name in shipped.changed else 'unchanged'}")
    if not origin.passed:
        print("this run FAILED its gates; the manifest says so")
    print("\n".join(rollout(shipped, origin.recipe)))
    return 0
