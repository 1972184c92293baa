"""The lengths of a recipe's texts in tokens, and the sequence length that its engines need for them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from torch import nn

from optin_export.data import Sources
from optin_export.data.batches import TextProcessor, _positions

#: Share of the rows that should not be cut, and the number that lengths are multiples of, which suits engines' kernels.
WHOLE, STEP = 0.99, 16


@dataclass(frozen=True)
class Length:
    """sequence: tokens, with the tokenizer's own marks. cut: share of the rows that are longer. limited: by the model
    or its tokenizer."""

    sequence: int
    cut: float
    limited: bool


def positions(model: nn.Module) -> int | None:
    """The longest sequence for which a task model has positions; None if unlimited."""
    return _positions(getattr(model, "model", model))


def fitting_length(sources: Sources) -> Length | None:
    """The length that leaves 99 % of the calibration rows whole; None for images.

    It does not exceed the model's positions, its tokenizer's limit, and the length at which sentence-transformers cuts.
    """
    processor = sources.processor
    if not isinstance(processor, TextProcessor):
        return None
    encoded = processor._tokenise(sources.calibration_examples, truncation=False, max_length=None)
    lengths = np.array([len(ids) for ids in encoded["input_ids"]])
    wanted = int(-(-np.quantile(lengths, WHOLE, method="higher") // STEP)) * STEP
    known = (positions(sources.model), processor.tokenizer.model_max_length, processor.whole)
    limits = [most for most in known if most is not None]
    sequence = min([wanted, *limits])
    return Length(sequence, float((lengths > sequence).mean()), sequence < wanted)
