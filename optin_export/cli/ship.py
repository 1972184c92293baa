"""`optin-export ship`: write a finished run into a Triton model repository."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from optin_export.cli._group import PATH, command, run_argument, ship_option, wait_option
from optin_export.errors import InputError


@command
@run_argument
@click.option("--to", metavar="DIR|URL", required=True, help="The model repository: a folder, or s3://, gs:// ...")
@click.option("--name", metavar="NAME", help="The model's name in the repository (default: the recipe's name).")
@ship_option
@click.option(
    "--config", type=PATH, metavar="FILE", help="Your part of config.pbtxt (.pbtxt or .yaml), instead of ship.config."
)
@click.option(
    "--deploy",
    type=PATH,
    metavar="DIR",
    help="Also write files for Docker, Kubernetes, KServe, monitoring.",
)
@click.option("--allow-failed", is_flag=True, help="Ship a run that failed its gates; the manifest says so.")
@click.option("--replace", is_flag=True, help="Overwrite models of another run.")
@wait_option
@click.option("--bom", is_flag=True, help="Add a CycloneDX bill of materials to each model.")
@click.option(
    "--sign-key", type=PATH, metavar="PEM", help="Sign each model (needs: pip install 'optin-export[signing]')."
)
def ship(
    run: Path,
    to: str,
    name: str | None,
    overrides: tuple[str, ...],
    config: Path | None,
    deploy: Path | None,
    allow_failed: bool,
    replace: bool,
    wait: bool,
    bom: bool,
    sign_key: Path | None,
    as_json: bool,
) -> int:
    """Write a finished run into a Triton model repository.

    RUN is the folder of a finished run. A run that failed its gates is refused (exit code 4). A repository in a folder
    changes as a whole or not at all; one at a URL of fsspec is uploaded file by file, and has no rollback.
    """
    from optin_export import ship as shipping
    from optin_export.ship.guide import rollout
    from optin_export.ship.names import check_name
    from optin_export.ship.remote import MARK
    from optin_export.workdir.files import read_json
    from optin_export.workdir.lock import held
    from optin_export.workdir.run_directory import existing_run

    existing_run(run)
    if deploy is not None and MARK in to:
        raise InputError(
            "--deploy needs a repository in a folder", f"{to} is a URL", "ship to a folder as well, with --deploy"
        )
    if name is not None:
        check_name(name)
    with held(run, "optin-export ship", wait):
        own = () if config is None else (f"ship.config={json.dumps(_own_config(config))}",)
        origin = shipping.Origin.from_run(run, (*overrides, *own))
        shipping.check_tools()
        origin.check(shipping.files_of(origin), allow_failed)
        if MARK in to:
            shipped = shipping.ship_to_store(origin, to, name, replace=replace, bom=bom, key=sign_key)
        else:
            shipped = shipping.ship_models(origin, Path(to), name, replace=replace, bom=bom, key=sign_key)
    files = []
    if deploy is not None:
        from optin_export.ship.deploy import write

        files = [str(path) for path in write(deploy, shipped, origin.recipe, replace)]
    quick = bool(read_json(run / "report.json").get("quick", False))
    place = shipped.url or str(shipped.repository)
    if as_json:
        described = {"repository": place, "models": shipped.names, "changed": shipped.changed, "files": files}
        print(json.dumps({**described, "image": str(shipped.image), "passed": origin.passed, "quick": quick}))
        return 0
    for model in shipped.names:
        print(f"{place}/{model}: {'written' if model in shipped.changed else 'unchanged'}")
    if quick:
        print("this run was measured quickly (--quick): its speedup is a first look")
    if not origin.passed:
        print("this run FAILED its gates; the manifest says so")
    if files:
        print(f"deployment files: {', '.join(files)}")
    print("\n".join(rollout(shipped, origin.recipe)))
    return 0


def _own_config(path: Path) -> Any:
    """A part of config.pbtxt: the mapping in a YAML file, or the text of any other."""
    import yaml

    from optin_export.recipe.strict_yaml import parse_yaml
    from optin_export.workdir.files import MAX_TEXT, read_text

    fix = "give a file of protobuf text, or a .yaml file with the same fields"
    try:
        text = read_text(path, MAX_TEXT)
        found = parse_yaml(text) if path.suffix in (".yaml", ".yml") else text
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise InputError(f"cannot read {path}", str(error), fix) from None
    if not found or not isinstance(found, str | dict):
        raise InputError(f"{path} is not a part of a config.pbtxt", "it has no fields", fix)
    return found
