"""Task modules of sound: a class per recording, or a row per frame of speech."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn

from optin_export.models.logits import logits_of

if TYPE_CHECKING:
    from optin_export.models.tasks import OutputKind, OutputLayout


class AudioModel(nn.Module):
    """A transformers model of sound, or a module of the same form.

    forward(input_values or input_features, float32 [batch, ...] as the model's feature extractor gives them; an
    attention_mask int64 [batch, samples] if it gives one) returns `logits` [batch, classes]; for speech recognition
    `logits` [batch, frames, vocabulary] of a CTC model, or `encoder_states` [batch, frames, hidden] of an encoder.

    encoder: the module is the encoder of a model whose decoder stays whole.
    """

    def __init__(self, model: nn.Module, task: str, encoder: bool = False) -> None:
        super().__init__()
        self.model = model
        self.output_layout: OutputLayout = "tokens" if task == "automatic-speech-recognition" else "vector"
        self.output_kind: OutputKind = "embedding" if encoder else "logits"
        self.output_name = "encoder_states" if encoder else "logits"

    def forward(
        self,
        input_values: torch.Tensor | None = None,
        input_features: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
    ) -> torch.Tensor:
        mask = {} if attention_mask is None else {"attention_mask": attention_mask}
        output = self.model(input_features if input_values is None else input_values, **mask)
        if self.output_kind == "embedding" and not isinstance(output, torch.Tensor):
            output = output.last_hidden_state
        return logits_of(output)

    def block_mask(self, mask: torch.Tensor) -> torch.Tensor:
        """bool [batch, frames]: which frames of the blocks are not padding, of a mask of input samples.

        The mask as it is if the model does not say how its convolutions shorten it.
        """
        shorten = getattr(self.model, "_get_feat_extract_output_lengths", None)
        count = mask.shape[1] if shorten is None else int(shorten(mask.shape[1], **self._before_adapter))
        found = None if shorten is None else self._shortened(mask, count, **self._before_adapter)
        return mask.bool() if found is None else found

    def frames(self, mask: torch.Tensor, count: int) -> torch.Tensor | None:
        """bool [batch, count]: which output frames are not padding, of a mask of input samples; None if unknown."""
        if mask.shape[1] == count:
            return mask.bool()
        return self._shortened(mask, count)

    @property
    def _before_adapter(self) -> dict[str, bool]:
        """Arguments of transformers' functions of lengths: frames of the blocks, not of an adapter after them."""
        return {"add_adapter": False} if getattr(getattr(self.model, "config", None), "add_adapter", False) else {}

    def _shortened(self, mask: torch.Tensor, count: int, **which: bool) -> torch.Tensor | None:
        shortened = getattr(self.model, "_get_feature_vector_attention_mask", None)
        return None if shortened is None else shortened(count, mask, **which).bool()
