"""`optin-export schema`: JSON schemas of the files that people write."""

from __future__ import annotations

import click

from optin_export.cli._group import command


@command
@click.argument("name", type=click.Choice(["recipe", "gates"]), default="recipe")
def schema(name: str, as_json: bool) -> int:
    """Print the JSON schema of recipes or gates, for editors.

    An editor with a YAML language server completes and checks a recipe that begins with the line
    '# yaml-language-server: $schema=recipe.schema.json'.
    """
    from optin_export.cli._gates import GatesFile
    from optin_export.recipe import Recipe
    from optin_export.recipe.manual import schema_text

    print(schema_text(Recipe if name == "recipe" else GatesFile), end="")
    return 0
