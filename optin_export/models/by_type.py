"""Architectures of transformers by their `model_type`, without a checkpoint."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import Any

from optin_export.errors import InputError

#: `hf:model_type=bert`: an architecture of transformers without a checkpoint.
BY_TYPE = "model_type="


def config_of_type(name: str, fields: Mapping[str, Any]) -> Any:
    """The configuration of an architecture by its `model_type`, with these fields; nothing is downloaded."""
    import transformers

    known = sorted(transformers.CONFIG_MAPPING.keys())
    if name not in known:
        near = difflib.get_close_matches(name, known, n=3)
        hint = f": {', '.join(near)}" if near else ""
        raise InputError(
            f"cannot create the model 'hf:{BY_TYPE}{name}'",
            f"transformers {transformers.__version__} has no such model_type",
            f"use one of its types{hint}",
        )
    # A configuration takes whatever it is given: a field that a fresh one does not have is a slip.
    fresh = transformers.AutoConfig.for_model(name)
    unknown = next((field for field in fields if not hasattr(fresh, field)), None)
    if unknown is not None:
        names = [field for field in fresh.to_dict() if not field.startswith("_")]
        near = difflib.get_close_matches(unknown, names, n=3) or names[:5]
        raise InputError(
            f"model.args.{unknown} is not a field of '{name}'",
            f"{type(fresh).__name__} does not have it",
            f"use one of its fields, such as {', '.join(near)}",
        )
    return transformers.AutoConfig.for_model(name, **fields)
