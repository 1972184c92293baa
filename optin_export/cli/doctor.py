"""`optin-export doctor`: what this machine can build and run, and what a recipe of yours could not do here."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from optin_export.cli._machine import Check
    from optin_export.errors import OptinError
    from optin_export.recipe import Recipe

EPILOG = (
    "exit code 0: the recipe (without one: a small model on the CPU, by onnxruntime) can be built and measured here; "
    "2: a run would refuse it, for the reason that is named; 5: something is missing; nothing is installed or changed"
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("recipe", metavar="RECIPE", nargs="?", help="also: can this recipe be built and measured here?")
    parser.add_argument(
        "--set", action="append", default=[], metavar="A.B=C", help="override a field, e.g. targets.0.engine=torch"
    )


def run(options: argparse.Namespace) -> int:
    from optin_export.cli import _machine
    from optin_export.errors import EnvironmentLacks, InputError
    from optin_export.recipe import load_recipe

    if options.set and options.recipe is None:
        raise InputError("--set overrides nothing", "no recipe was given", "name the recipe first")
    recipe = None if options.recipe is None else load_recipe(options.recipe, options.set)
    found = list(_machine.checks(Path("runs")))
    needed = [one for one in found if one.name in _needed(recipe)]
    refusal = None
    if recipe is not None:
        more, refusal = _of_recipe(recipe)
        needed += more
    lacking = [one for one in needed if one.state not in ("ok", "warning", "not checked")]
    unknown = [one for one in needed if one.state == "not checked"]
    job = "the default job (a small model on the CPU)" if recipe is None else f"the recipe {recipe.name}"
    if options.json:
        described = {"checks": [asdict(one) for one in found], "job": job, "able": not lacking}
        print(json.dumps({**described, "needed": [asdict(one) for one in needed]}))
    else:
        _print(found)
        if recipe is not None:
            print(f"\n{recipe.name} needs")
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
        return "NOT here, see above:"
    return "nothing speaks against it, but not all could be checked:" if unknown else "can be built and measured here"


def _needed(recipe: Recipe | None) -> tuple[str, ...]:
    """Names of the machine's checks that a job depends on."""
    from optin_export.cli._machine import DEFAULT

    if recipe is None:
        return DEFAULT
    names = [name for name in DEFAULT if not name.startswith("engine")]
    if recipe.ship.triton:
        names.append("triton client")
    if recipe.export.quantizer == "modelopt":
        names.append("nvidia-modelopt")
    data = [recipe.data.calibration, recipe.data.evaluation]
    data += [recipe.finetune.data] if recipe.finetune is not None else []
    if any(one is not None and one.source.startswith("hf-dataset:") for one in data):
        names.append("datasets")
    return tuple(names)


def _of_recipe(recipe: Recipe) -> tuple[list[Check], OptinError | None]:
    """Its targets, and what a run checks at its start; the error that the run would end with there."""
    from optin_export.cli._machine import Check, engine_check
    from optin_export.errors import EnvironmentLacks
    from optin_export.recipe import expand
    from optin_export.stages.preflight import Known, preflight

    found = [engine_check(target, f"target {target.name}") for target in recipe.targets]
    known = Known()
    checked = [preflight(one, known) for one in ([one.recipe for one in expand(recipe)] or [recipe])]
    # Of a sweep that run which is refused, or else the first.
    shown = next((one for one in checked if one.refusal is not None), checked[0])
    for one in shown.findings:
        if one.name == "engines":
            continue  # the targets' own lines say it
        lacks = isinstance(one.error, EnvironmentLacks)
        found.append(
            Check(one.name, "missing" if lacks else one.state, one.detail, None if one.error is None else one.error.fix)
        )
    return found, shown.refusal


def _print(found: list[Check]) -> None:
    for one in found:
        fix = f"   -> {one.fix}" if one.state not in ("ok", "warning", "not checked") and one.fix else ""
        print(f"{one.state:<11} {one.name:<42} {one.detail}{fix}")
