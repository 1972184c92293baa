"""What a model's forward takes."""

from __future__ import annotations

import inspect

from torch import nn


def takes(module: nn.Module, name: str) -> bool:
    """Whether the module's forward has an argument of this name, or takes any; True if it does not say."""
    try:
        parameters = inspect.signature(module.forward).parameters.values()
    except (TypeError, ValueError):  # compiled code
        return True
    named = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    return any(
        one.kind is inspect.Parameter.VAR_KEYWORD or (one.name == name and one.kind in named) for one in parameters
    )
