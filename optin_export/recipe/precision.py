"""Names of the engines of one run: the unpruned and the pruned model, in fp32 and in the recipe's precision.

`base` and `pruned` are fp32; `base.int8` and `pruned.int8` are the same models in int8, and so on. Files, measurements
and the report all use these names.
"""

from __future__ import annotations

from typing import Literal

__all__ = ["MODELS", "Precision", "engine_name", "engine_names", "model_of", "precision_of"]

Precision = Literal["fp32", "fp16", "bf16", "int8", "fp8"]
MODELS = ("base", "pruned")


def engine_name(model: str, precision: str) -> str:
    """'base' in fp32, 'base.int8' in int8."""
    return model if precision == "fp32" else f"{model}.{precision}"


def engine_names(precision: str) -> tuple[str, ...]:
    """All engines of a run: both models in fp32, then both in `precision` if that is another."""
    names = (engine_name(model, each) for each in ("fp32", precision) for model in MODELS)
    return tuple(dict.fromkeys(names))


def model_of(name: str) -> str:
    """'base' or 'pruned'."""
    return name.partition(".")[0]


def precision_of(name: str) -> str:
    return name.partition(".")[2] or "fp32"
