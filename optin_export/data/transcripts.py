"""The texts that are spoken in recordings, and how a model's output becomes a text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

import numpy as np
import torch

from optin_export.data.readers import Examples
from optin_export.errors import InputError
from optin_export.models.audio import AudioModel
from optin_export.models.loading import LoadedModel
from optin_export.models.tasks import Inputs
from optin_export.models.tokenizer import load_tokenizer
from optin_export.recipe import Recipe


class Listener(Protocol):
    """Turns a model's output for one recording into a text."""

    def text_of(self, output: np.ndarray, mask: torch.Tensor | None) -> str:
        """output: float32 [frames, features]; mask: int64 [samples], which samples are not padding, if the model reads
        one."""


@dataclass(frozen=True)
class Transcript:
    """text: what is spoken in one recording. The others are for `Listener.text_of`."""

    text: str
    listener: Listener
    mask: torch.Tensor | None

    def heard(self, output: np.ndarray) -> str:
        """The text of a model's output, float32 [frames, features]."""
        return self.listener.text_of(output, self.mask)


@dataclass(frozen=True)
class FrameListener:
    """For a CTC model: the text of the likeliest token of every frame; frames of padding are left out."""

    tokenizer: Any
    model: AudioModel

    def text_of(self, output: np.ndarray, mask: torch.Tensor | None) -> str:
        tokens = output.argmax(-1)
        counted = None if mask is None else self.model.frames(mask[None], len(tokens))
        return str(self.tokenizer.decode(tokens if counted is None else tokens[counted[0].numpy()]))


@dataclass(frozen=True)
class DecoderListener:
    """For an encoder: what transformers' `generate` gives with the whole decoder of the model's folder."""

    tokenizer: Any
    origin: str
    trust_remote_code: bool

    @cached_property
    def model(self) -> Any:
        """The whole model, loaded when the first recording is heard."""
        from transformers import AutoModelForSpeechSeq2Seq

        model = AutoModelForSpeechSeq2Seq.from_pretrained(self.origin, trust_remote_code=self.trust_remote_code)
        return model.float().eval()

    def text_of(self, output: np.ndarray, mask: torch.Tensor | None) -> str:
        from transformers.modeling_outputs import BaseModelOutput

        states = BaseModelOutput(last_hidden_state=torch.from_numpy(output)[None])
        with torch.no_grad():
            [tokens] = self.model.generate(encoder_outputs=states)
        return str(self.tokenizer.decode(tokens, skip_special_tokens=True))


def make_listener(loaded: LoadedModel, recipe: Recipe) -> Listener | None:
    """The listener of a model whose transcripts are evaluated; None without an evaluation of them.

    Raises InputError if the model has no tokenizer, or if the decoder that belongs to an encoder is not known.
    """
    if recipe.data.evaluation is None or recipe.data.evaluation.metric != "wer":
        return None
    model = loaded.model
    assert isinstance(model, AudioModel)
    tokenizer = load_tokenizer(recipe.model, loaded.origin)
    if model.output_kind == "logits":
        return FrameListener(tokenizer, model)
    if loaded.origin is None or recipe.model.weights != "pretrained":
        raise InputError(
            "the metric wer is not defined for this model",
            "the run exports its encoder, and transcripts need the decoder that was trained with it",
            "give a folder that holds both with model.weights: pretrained, or leave data.evaluation out",
        )
    return DecoderListener(tokenizer, loaded.origin, recipe.model.trust_remote_code)


def transcripts(listener: Listener, examples: Examples, inputs: Inputs) -> list[Transcript]:
    """The right text of every row, with what hears the row's output."""
    texts = examples.columns["label"]
    masks = inputs.get("attention_mask", [None] * len(texts))
    return [Transcript(text, listener, mask) for text, mask in zip(texts, masks, strict=True)]


def spoken(examples: Examples) -> Sequence[str]:
    """The text of every recording. Raises InputError for a label that is no text."""
    if examples.classes is not None:
        raise InputError(
            f"the label of {examples.where(0)} is not a text",
            "it is the name of a class, by its folder or file name",
            "give a csv: or tsv: source with a column of files and one of their texts",
        )
    for row, label in enumerate(examples.columns["label"]):
        if not isinstance(label, str):
            raise InputError(
                f"the label of {examples.where(row)} is not a text",
                f"it is {label!r:.80}",
                "set columns.label to the column of the transcripts",
            )
    return list(examples.columns["label"])
