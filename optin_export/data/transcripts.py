"""The texts that are spoken in recordings, and how a CTC model's output becomes a text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from optin_export.data.readers import Examples
from optin_export.errors import InputError
from optin_export.models.audio import AudioModel
from optin_export.models.loading import LoadedModel
from optin_export.models.tasks import Inputs
from optin_export.models.tokenizer import load_tokenizer
from optin_export.recipe import Recipe


@dataclass(frozen=True)
class Transcript:
    """text: what is spoken in one recording. listener: the model's tokenizer and lengths; mask: int64 [samples]."""

    text: str
    listener: Listener
    mask: torch.Tensor | None

    def heard(self, tokens: np.ndarray) -> str:
        """The text of the likeliest token of every frame, int64 [frames]; frames of padding are left out."""
        return self.listener.text_of(tokens, self.mask)


@dataclass(frozen=True)
class Listener:
    """A CTC model's tokenizer, and the model, which says how many frames a recording has."""

    tokenizer: Any
    model: AudioModel

    def targets(self, examples: Examples, inputs: Inputs) -> list[Transcript]:
        masks = inputs.get("attention_mask", [None] * len(examples))
        texts = examples.columns["label"]
        return [Transcript(text, self, mask) for text, mask in zip(texts, masks, strict=True)]

    def text_of(self, tokens: np.ndarray, mask: torch.Tensor | None) -> str:
        counted = None if mask is None else self.model.frames(mask[None], len(tokens))
        real = tokens if counted is None else tokens[counted[0].numpy()]
        return str(self.tokenizer.decode(real))


def make_listener(loaded: LoadedModel, recipe: Recipe) -> Listener | None:
    """The listener of a CTC model whose transcripts are evaluated; None without an evaluation.

    Raises InputError if the model gives no tokens, or has no tokenizer.
    """
    if recipe.data.evaluation is None or recipe.data.evaluation.metric != "wer":
        return None
    model = loaded.model
    assert isinstance(model, AudioModel)
    if model.output_kind != "logits":
        raise InputError(
            "the metric wer is not defined for this model",
            "its engine is the encoder alone, and gives states instead of tokens; the decoder stays as it is",
            "leave data.evaluation out, and compare transcripts with the whole decoder yourself (docs/howto/audio.md)",
        )
    return Listener(load_tokenizer(recipe.model, loaded.origin), model)


def spoken(examples: Examples) -> Sequence[str]:
    """The text of every recording. Raises InputError for a label that is no text."""
    for row, label in enumerate(examples.columns["label"]):
        if not isinstance(label, str):
            raise InputError(
                f"the label of {examples.where(row)} is not a text",
                f"it is {label!r:.80}",
                "set columns.label to the column of the transcripts",
            )
    return list(examples.columns["label"])
