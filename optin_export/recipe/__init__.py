"""recipe: a YAML file and overrides become a frozen, validated Recipe with absolute paths. Knows nothing of torch."""

from __future__ import annotations

from typing import TYPE_CHECKING

from optin_export import lazy

if TYPE_CHECKING:
    from optin_export.recipe.alignment import Alignment
    from optin_export.recipe.budget import Budget
    from optin_export.recipe.delivery import AUTO, ShipSection, Target
    from optin_export.recipe.export import ExportSection
    from optin_export.recipe.gates import MOST_OTHER_WORK, Gates
    from optin_export.recipe.load import expand, load_recipe, validate
    from optin_export.recipe.measurement import FULL_BLOCKS, MOST_BLOCKS, MeasureSection
    from optin_export.recipe.model import ModelSection
    from optin_export.recipe.paths import absolute_source
    from optin_export.recipe.precision import MODELS, Precision, engine_name, engine_names, model_of, precision_of
    from optin_export.recipe.prune import PruneSection
    from optin_export.recipe.schema import (
        IGNORED,
        DataSource,
        FinetuneSection,
        Recipe,
    )
    from optin_export.recipe.sweep import Variant
    from optin_export.recipe.tasks import METRICS
    from optin_export.recipe.tokens import TokensSection

__all__ = [
    "AUTO",
    "FULL_BLOCKS",
    "IGNORED",
    "METRICS",
    "MODELS",
    "MOST_BLOCKS",
    "MOST_OTHER_WORK",
    "Alignment",
    "Budget",
    "DataSource",
    "ExportSection",
    "FinetuneSection",
    "Gates",
    "MeasureSection",
    "ModelSection",
    "Precision",
    "PruneSection",
    "Recipe",
    "ShipSection",
    "Target",
    "TokensSection",
    "Variant",
    "absolute_source",
    "engine_name",
    "engine_names",
    "expand",
    "load_recipe",
    "model_of",
    "precision_of",
    "validate",
]

__getattr__, __dir__ = lazy.names(
    __name__,
    {
        "alignment": "Alignment",
        "budget": "Budget",
        "delivery": "AUTO ShipSection Target",
        "export": "ExportSection",
        "gates": "MOST_OTHER_WORK Gates",
        "load": "expand load_recipe validate",
        "measurement": "FULL_BLOCKS MOST_BLOCKS MeasureSection",
        "model": "ModelSection",
        "paths": "absolute_source",
        "precision": "MODELS Precision engine_name engine_names model_of precision_of",
        "prune": "PruneSection",
        "schema": "IGNORED DataSource FinetuneSection Recipe",
        "sweep": "Variant",
        "tasks": "METRICS",
        "tokens": "TokensSection",
    },
)
