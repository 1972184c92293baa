"""Write the JSON schemas of the public files (recipe, report, plan, architecture) to docs/schemas/, from the code."""

from __future__ import annotations

from pathlib import Path

from pydantic import BaseModel

from optin_export.cli._gates import GatesFile
from optin_export.pruning import Architecture
from optin_export.recipe import Recipe
from optin_export.recipe.manual import schema_text
from optin_export.report.schema import Report
from optin_export.search import Plan

FOLDER = Path(__file__).parent.parent / "docs" / "schemas"
MODELS: dict[str, type[BaseModel]] = {
    "recipe": Recipe,
    "report": Report,
    "plan": Plan,
    "architecture": Architecture,
    "gates": GatesFile,
}


def main() -> None:
    FOLDER.mkdir(parents=True, exist_ok=True)
    for name, model in MODELS.items():
        (FOLDER / f"{name}.schema.json").write_text(schema_text(model), encoding="utf-8")
        print(FOLDER / f"{name}.schema.json")


if __name__ == "__main__":
    main()
