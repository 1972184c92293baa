"""`optin-export schema`: the JSON schema of a file people write, for their editors."""

from __future__ import annotations

import argparse

EPILOG = (
    "an editor with a YAML language server completes and checks a recipe that begins with the line "
    "'# yaml-language-server: $schema=recipe.schema.json'"
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("name", choices=["recipe", "gates"], nargs="?", default="recipe", help="default: recipe")


def run(options: argparse.Namespace) -> int:
    from optin_export.cli._gates import GatesFile
    from optin_export.recipe import Recipe
    from optin_export.recipe.manual import schema_text

    print(schema_text(Recipe if options.name == "recipe" else GatesFile), end="")
    return 0
