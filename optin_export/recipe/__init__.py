"""recipe: a YAML file and overrides become a frozen, validated Recipe with absolute paths. Knows nothing of torch."""

from __future__ import annotations

from optin_export.recipe.delivery import Target
from optin_export.recipe.load import load_recipe, validate
from optin_export.recipe.schema import (
    Budget,
    DataSource,
    FinetuneSection,
    Gates,
    ModelSection,
    PruneSection,
    Recipe,
    TokensSection,
)

__all__ = [
    "Budget",
    "DataSource",
    "FinetuneSection",
    "Gates",
    "ModelSection",
    "PruneSection",
    "Recipe",
    "Target",
    "TokensSection",
    "load_recipe",
    "validate",
]
