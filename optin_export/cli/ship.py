"""`optin-export ship`: write a finished run into a Triton model repository."""

from __future__ import annotations

import json
from pathlib import Path

import click

from optin_export.cli._group import PATH, command, run_argument, ship_option, wait_option


@command
@run_argument
@click.option("--to", type=PATH, metavar="DIR", required=True, help="The model repository.")
@click.option("--name", metavar="NAME", help="The model's name in the repository (default: the recipe's name).")
@ship_option
@click.option("--allow-failed", is_flag=True, help="Ship a run that failed its gates; the manifest says so.")
@click.option("--replace", is_flag=True, help="Overwrite models of another run.")
@wait_option
@click.option("--bom", is_flag=True, help="Add a CycloneDX bill of materials to each model.")
@click.option(
    "--sign-key", type=PATH, metavar="PEM", help="Sign each model (needs: pip install 'optin-export[signing]')."
)
def ship(
    run: Path,
    to: Path,
    name: str | None,
    overrides: tuple[str, ...],
    allow_failed: bool,
    replace: bool,
    wait: bool,
    bom: bool,
    sign_key: Path | None,
    as_json: bool,
) -> int:
    """Write a finished run into a Triton model repository.

    RUN is the folder of a finished run. A run that failed its gates is refused (exit code 4). The repository changes
    as a whole or not at all.
    """
    from optin_export import ship as shipping
    from optin_export.ship.config import check_name
    from optin_export.ship.guide import rollout
    from optin_export.workdir.files import read_json
    from optin_export.workdir.lock import held
    from optin_export.workdir.run_directory import existing_run

    existing_run(run)
    if name is not None:
        check_name(name)
    with held(run, "optin-export ship", wait):
        origin = shipping.Origin.from_run(run, overrides)
        shipping.check_tools()
        origin.check(shipping.files_of(origin), allow_failed)
        shipped = shipping.ship_models(origin, to, name, replace=replace, bom=bom, key=sign_key)
    quick = bool(read_json(run / "report.json").get("quick", False))
    if as_json:
        described = {"repository": str(shipped.repository), "models": shipped.names, "changed": shipped.changed}
        print(json.dumps({**described, "image": shipped.image, "passed": origin.passed, "quick": quick}))
        return 0
    for model in shipped.names:
        print(f"{shipped.repository / model}: {'written' if model in shipped.changed else 'unchanged'}")
    if quick:
        print("this run was measured quickly (--quick): its speedup is a first look")
    if not origin.passed:
        print("this run FAILED its gates; the manifest says so")
    print("\n".join(rollout(shipped, origin.recipe)))
    return 0
