"""`optin-export doctor`: what this machine can build and run, with or without a recipe."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import click

from optin_export.cli._group import PATH, command
from optin_export.errors import EnvironmentLacks, InputError

if TYPE_CHECKING:
    from optin_export.cli._machine import Check
    from optin_export.errors import OptinError
    from optin_export.recipe import Recipe


@command
@click.argument("recipe", type=PATH, required=False)
@click.option(
    "--set", "overrides", multiple=True, metavar="A.B=C", help="Override a field, e.g. targets.0.engine=torch."
)
def doctor(recipe: Path | None, overrides: tuple[str, ...], as_json: bool) -> int:
    """Check this machine; print how to install what is missing.

    With RECIPE, also check whether this recipe can be built and measured here. Nothing is installed or changed.

    Exit code 0: the recipe (without one: a small model on the CPU, with onnxruntime) can be built and measured here; 2:
    a run would refuse the recipe, for the reason that is printed; 5: something is missing.
    """
    from optin_export.cli import _machine
    from optin_export.recipe import load_recipe

    if overrides and recipe is None:
        raise InputError("--set needs a recipe", "it overrides a field of one", "name the recipe first")
    wanted = None if recipe is None else load_recipe(recipe, overrides)
    found = list(_machine.checks(Path("runs")))
    needed = [one for one in found if one.name in _needed(wanted)]
    refusal = None
    if wanted is not None:
        more, refusal = _of_recipe(wanted)
        needed += more
    lacking = [one for one in needed if one.state not in ("ok", "warning", "not checked")]
    unknown = [one for one in needed if one.state == "not checked"]
    job = "the default job (a small model on the CPU)" if wanted is None else f"the recipe {wanted.name}"
    if as_json:
        described = {"checks": [asdict(one) for one in found], "job": job, "able": not lacking}
        print(json.dumps({**described, "needed": [asdict(one) for one in needed]}))
    else:
        _print(found)
        if wanted is not None:
            print(f"\n{wanted.name} needs")
            _print(needed)
        print(f"\n{job}: {_verdict(bool(lacking), bool(unknown))}")
        print(
            "\n".join(
                f"  {one.name}: {one.detail}" + (f"\n    {one.fix}" if one.fix else "") for one in lacking + unknown
            )
        )
    if refusal is not None:
        return refusal.exit_code
    return EnvironmentLacks.exit_code if lacking else 0


def _verdict(lacking: bool, unknown: bool) -> str:
    if lacking:
        return "CANNOT be built and measured here:"
    return "no problem found, but some checks were not possible:" if unknown else "can be built and measured here"


def _needed(recipe: Recipe | None) -> tuple[str, ...]:
    """Names of the machine's checks that a job depends on."""
    from optin_export.cli._machine import DEFAULT

    if recipe is None:
        return DEFAULT
    names = [name for name in DEFAULT if not name.startswith("engine")]
    if recipe.ship.triton:
        names.append("triton client")
    if recipe.export.precision == "int8" and any(target.engine == "openvino" for target in recipe.targets):
        names.append("nncf")
    data = [recipe.data.calibration, recipe.data.evaluation]
    data += [recipe.finetune.data] if recipe.finetune is not None else []
    if any(one is not None and one.source.startswith("hf-dataset:") for one in data):
        names.append("datasets")
    return tuple(names)


def _of_recipe(recipe: Recipe) -> tuple[list[Check], OptinError | None]:
    """The checks of a recipe's targets and of a run's start, and the error with which a run would stop there."""
    from optin_export.cli._machine import Check, target_check
    from optin_export.recipe import expand
    from optin_export.stages.preflight import Known, preflight

    found = [target_check(target, recipe) for target in recipe.targets]
    known = Known()
    checked = [preflight(one, known) for one in ([one.recipe for one in expand(recipe)] or [recipe])]
    # A sweep: the first run that is refused, or else the first.
    shown = next((one for one in checked if one.refusal is not None), checked[0])
    for one in shown.findings:
        if one.name == "engines":
            continue  # already in the checks of the targets
        lacks = isinstance(one.error, EnvironmentLacks)
        found.append(
            Check(one.name, "missing" if lacks else one.state, one.detail, None if one.error is None else one.error.fix)
        )
    return found, shown.refusal


def _print(found: list[Check]) -> None:
    for one in found:
        fix = f"   -> {one.fix}" if one.state not in ("ok", "warning", "not checked") and one.fix else ""
        print(f"{one.state:<11} {one.name:<42} {one.detail}{fix}")
