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
@click.option("--to", type=PATH, metavar="DIR", required=True, help="The model repository.")
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
    to: Path,
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

    RUN is the folder of a finished run. A run that failed its gates is refused (exit code 4). The repository changes
    as a whole or not at all.
    """
    from optin_export import ship as shipping
    from optin_export.ship.guide import rollout
    from optin_export.ship.names import check_name
    from optin_export.workdir.lock import held
    from optin_export.workdir.run_directory import existing_run

    existing_run(run)
    if name is not None:
        check_name(name)
    with held(run, "optin-export ship", wait):
        own = () if config is None else (f"ship.config={json.dumps(_own_config(config))}",)
        origin = shipping.Origin.from_run(run, (*overrides, *own))
        shipping.check_tools()
        origin.check(shipping.files_of(origin), allow_failed)
        shipped = shipping.ship_models(origin, to, name, replace=replace, bom=bom, key=sign_key)
    files = []
    if deploy is not None:
        from optin_export.ship.deploy import write

        files = [str(path) for path in write(deploy, shipped, origin.recipe, replace)]
    if as_json:
        described = {"repository": str(shipped.repository), "models": shipped.names, "changed": shipped.changed}
        print(json.dumps({**described, "image": str(shipped.image), "passed": origin.passed, "files": files}))
        return 0
    for model in shipped.names:
        print(f"{shipped.repository / model}: {'written' if model in shipped.changed else 'unchanged'}")
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
