"""How a command is declared, and how it is looked up by the first word of the command line."""

from __future__ import annotations

import difflib
import importlib
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
from click.shell_completion import CompletionItem

from optin_export.errors import InputError

PROGRAM = "optin-export"
#: The shell sets this variable when it asks for completions.
COMPLETION_VARIABLE = "_OPTIN_EXPORT_COMPLETE"
#: In the order of `optin-export --help`; each is a function in the module of that name (with _ for -). A recipe file
#: that has one of these names must be written as ./name.
COMMANDS = (
    "init",
    "doctor",
    "explain",
    "families",
    "check-family",
    "schema",
    "completion",
    "check",
    "compare",
    "measure",
    "export",
    "ship",
    "rollback",
    "verify",
    "serve",
    "client",
    "tune",
)
#: What no arguments at all are answered with.
FIRST_HELP = f"""\
{PROGRAM} RECIPE.yaml      prune a model, build engines, measure them, and ship the result or refuse it
{PROGRAM} COMMAND [ARGS]   {", ".join(COMMANDS[:8])},
{" " * len(PROGRAM)}                  {", ".join(COMMANDS[8:])}
{PROGRAM} --help           all options, and what each command does

new here? {PROGRAM} init   (asks for your model and data, and writes a recipe)"""
#: First words that other tools use -> what does this here.
ELSEWHERE = {
    **dict.fromkeys(("run", "prune", "compress", "optimize", "optimise", "start"), f"{PROGRAM} RECIPE.yaml"),
    **dict.fromkeys(("validate", "plan", "dry-run"), f"{PROGRAM} RECIPE.yaml --dry-run"),
    "sweep": f"{PROGRAM} RECIPE.yaml, where the recipe has a section sweep: ({PROGRAM} explain sweep)",
    **dict.fromkeys(("quantize", "quantise"), f"{PROGRAM} RECIPE.yaml --set export.precision=int8"),
    **dict.fromkeys(("new", "create", "setup", "config", "quickstart"), f"{PROGRAM} init"),
    **dict.fromkeys(("bench", "benchmark", "profile"), f"{PROGRAM} measure RUN"),
    **dict.fromkeys(("convert", "save"), f"{PROGRAM} export RUN --format FORMAT"),
    **dict.fromkeys(("deploy", "publish"), f"{PROGRAM} ship RUN --to REPOSITORY"),
    **dict.fromkeys(("gates", "test"), f"{PROGRAM} check RUN"),
    **dict.fromkeys(("diff", "list"), f"{PROGRAM} compare RUN RUN ..."),
    **dict.fromkeys(("models", "architectures"), f"{PROGRAM} families"),
    **dict.fromkeys(("help", "commands"), f"{PROGRAM} --help"),
    "version": f"{PROGRAM} --version",
}
#: A file or a folder; the command itself checks that it exists.
PATH = click.Path(path_type=Path, readable=False)


#: Of every command itself: click keeps the help option of the first context that asks for it, also of a completion.
CONTEXT = {"help_option_names": ["-h", "--help"], "max_content_width": 100}


class Real(click.FloatRange):
    """A number in a range; click's own type accepts NaN as well."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        number: float = super().convert(value, param, ctx)
        if math.isnan(number):
            self.fail(f"{value!r} is not a number", param, ctx)
        return number


class RecipeOrCommand(click.Group):
    """A command that runs a recipe, unless its first word is the name of another command."""

    allow_interspersed_args = True
    allow_extra_args = False

    def make_context(
        self, info_name: str | None, args: list[str], parent: click.Context | None = None, **extra: Any
    ) -> click.Context:
        """The context of the command that the first word names, or else of the recipe's run."""
        command = command_of(args[0]) if args else None
        if command is not None:
            return command.make_context(f"{info_name} {args[0]}", args[1:], parent, **extra)
        if args and not extra.get("resilient_parsing"):
            _refuse_misspelt(args[0])
        return super().make_context(info_name, args, parent, **extra)

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        return command_of(cmd_name)

    # A recipe is an argument, not the name of a sub-command.
    parse_args = click.Command.parse_args
    invoke = click.Command.invoke
    shell_complete = click.Command.shell_complete


def command(function: Callable[..., int]) -> click.Command:
    """Declare a command: the function's name is its name, the docstring its help; it returns the exit code."""
    made: click.Command = click.command(context_settings=CONTEXT)(function)
    made.params.append(click.Option(["--json", "as_json"], is_flag=True, help="Print the result as JSON."))
    return made


run_argument = click.argument("run", type=PATH)
wait_option = click.option("--wait", is_flag=True, help="If another process uses the run folder, wait for it.")
ship_option = click.option(
    "--set", "overrides", multiple=True, metavar="SHIP.B=C", help="Override a field of the recipe's section ship."
)


def command_of(name: str) -> click.Command | None:
    """The command with this name, or None. Only its module is imported."""
    if name not in COMMANDS:
        return None
    function = name.replace("-", "_")
    found: click.Command = getattr(importlib.import_module(f"optin_export.cli.{function}"), function)
    return found


def complete_recipe(context: click.Context, parameter: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """Commands that begin with the word; files if no command does."""
    return [
        CompletionItem(incomplete, type="file"),
        *(CompletionItem(name) for name in COMMANDS if name.startswith(incomplete)),
    ]


def _refuse_misspelt(word: str) -> None:
    """Raises InputError for a word that looks like a command, if no file has this name."""
    if Path(word).suffix or "/" in word or os.path.lexists(word):
        return
    if word == "clean":
        raise InputError(
            "the command `clean` was removed",
            "a run folder holds plain files, and a run deletes by itself what an interrupted one left half-written",
            "delete a whole run with `rm -r runs/NAME`, or only its large folders onnx/, engines/ and model/",
        )
    if word.startswith("-"):
        return
    near = difflib.get_close_matches(word.lower(), COMMANDS, n=2, cutoff=0.6)
    if (instead := ELSEWHERE.get(word.lower())) is not None:
        fix = f"use {instead}"
    elif near:
        fix = f"did you mean `optin-export {'` or `optin-export '.join(near)}`?"
    else:
        fix = f"name a recipe file or a command (see {PROGRAM} --help); new here? {PROGRAM} init"
    raise InputError(
        f"there is no command and no recipe '{word:.60}'",
        "no file has this name, and it is not the name of a command",
        fix,
    )
