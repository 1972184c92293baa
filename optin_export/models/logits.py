"""The logits in what a classifier returns."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from optin_export.errors import InputError

#: Their names in a dictionary: transformers' and most own code's, torchvision's.
NAMES = ("logits", "out")


def logits_of(output: Any) -> torch.Tensor:
    """The tensor itself, the entry or attribute of that name, or the only tensor of a dictionary or sequence.

    Raises InputError if several tensors could be the logits.
    """
    if isinstance(output, torch.Tensor):
        return output
    for name in NAMES:
        named = output.get(name) if isinstance(output, Mapping) else getattr(output, name, None)
        if isinstance(named, torch.Tensor):
            return named
    values = list(output.values()) if isinstance(output, Mapping) else list(output) if _is_sequence(output) else []
    tensors = [one for one in values if isinstance(one, torch.Tensor)]
    if len(tensors) == 1:
        return tensors[0]
    if isinstance(output, Mapping):
        given = f"a dictionary with {', '.join(map(repr, list(output)[:6])) or 'nothing'}"
    else:
        given = f"a {type(output).__name__}" + (f" of {len(values)} values" if _is_sequence(output) else "")
    raise InputError(
        "which output of the model holds its logits is not known",
        f"forward returns {given}",
        "let it return the logits alone, or a dictionary with 'logits'",
    )


def _is_sequence(output: Any) -> bool:
    return isinstance(output, tuple | list)
