"""One module per kind of task: named tensor arguments in, one named tensor out. This is what is scored and exported."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal

import numpy as np
import torch
from torch import nn

from optin_export.errors import InputError
from optin_export.models.contrastive import TextTower
from optin_export.models.sentence import SentenceHead, make_activation, plain_steps

#: Task inputs by argument name, each a tensor whose first dimension is the batch.
Inputs = dict[str, torch.Tensor]
OutputKind = Literal["logits", "regression", "embedding"]
#: How a task's output is laid out: [batch, features]; per token [batch, tokens, features]; per question [batch, 2,
#: tokens] (start and end); per pixel [batch, features, height, width].
OutputLayout = Literal["vector", "tokens", "spans", "map"]
#: Label of what is not evaluated: padding, special tokens, unlabelled pixels.
IGNORED = -100
#: Logit at padding positions.
NEVER = -1e4
#: A class's share of a pixel below which it makes no difference.
LEAST_SHARE = 1e-6


#: Tasks whose output is not one vector per row.
_LAYOUTS: dict[str, OutputLayout] = {
    "token-classification": "tokens",
    "fill-mask": "tokens",
    "text-generation": "tokens",
    "question-answering": "spans",
}


class TextModel(nn.Module):
    """A transformers encoder or decoder with its task output.

    forward(input_ids, attention_mask[, token_type_ids]), each int64 [batch, sequence], returns
    `sentence_embedding` [batch, hidden], `scores` (of a CrossEncoder with an activation) or `logits`: [batch, classes];
    of every token, [batch, sequence, classes or vocabulary]; of question answering, [batch, 2, sequence] (start, end).

    head: from token states to the embedding; None if there is none, or the model pools by itself.
    reads_mask: false for an encoder to which padding is text like any other; it takes no attention_mask.
    """

    #: Where tokens were merged: gives what each of those that are left counts in a mean, [batch, tokens].
    token_weights: Callable[[], torch.Tensor] | None = None

    def __init__(
        self,
        model: nn.Module,
        task: str,
        pooling: str | None,
        normalize: bool,
        sentence: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        self.model = model
        self.output_layout: OutputLayout = _LAYOUTS.get(task, "vector")
        embeds, pools_itself = task == "feature-extraction", isinstance(model, TextTower)
        steps = (sentence or {}).get("steps") or plain_steps(pooling, normalize)
        self.head = SentenceHead(steps) if embeds and not pools_itself else None
        self.reads_mask = not (isinstance(model, TextTower) and model.pad is not None)
        self.normalize = normalize  # of a model that pools by itself; else the head's last step does it
        if self.head is not None and getattr(model, "pooler", None) is not None:
            model.register_module("pooler", None)  # its output is not used: do not count, ship or compute it
        name = (sentence or {}).get("activation") or "Identity"
        self.activation = None if embeds or name == "Identity" else make_activation(name)
        self.output_name = "sentence_embedding" if embeds else "logits" if self.activation is None else "scores"
        labels = getattr(getattr(model, "config", None), "num_labels", 2)
        one_number = labels == 1 and self.output_layout == "vector"
        self.output_kind: OutputKind = "embedding" if embeds else "regression" if one_number else "logits"

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        token_type_ids: torch.Tensor | None = None,
    ) -> torch.Tensor:
        segments: dict[str, Any] = {} if token_type_ids is None else {"token_type_ids": token_type_ids}
        output = self.model(input_ids=input_ids, attention_mask=attention_mask, **segments)
        if self.output_layout == "spans":
            return torch.stack([output.start_logits, output.end_logits], 1)
        if isinstance(output, torch.Tensor):
            return nn.functional.normalize(output, dim=-1) if self.normalize else output
        if self.head is None:
            return output.logits if self.activation is None else self.activation(output.logits)
        counts = attention_mask if self.token_weights is None else self.token_weights()
        assert counts is not None
        return self.head(output.last_hidden_state, counts)


class ImageModel(nn.Module):
    """An image model of any library: forward(pixel_values [batch, channels, H, W]) -> `logits` [batch, classes], or
    `image_embedding` [batch, hidden] of a model that outputs nothing else."""

    output_layout: OutputLayout = "vector"

    def __init__(self, model: nn.Module, embeds: bool = False, normalize: bool = False) -> None:
        super().__init__()
        self.model = model
        self.normalize = embeds and normalize
        self.output_name = "image_embedding" if embeds else "logits"
        self.output_kind: OutputKind = "embedding" if embeds else "logits"

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        output = self.model(pixel_values)
        result = output if isinstance(output, torch.Tensor) else output.logits
        return nn.functional.normalize(result, dim=-1) if self.normalize else result


class SegmentationModel(ImageModel):
    """A semantic segmentation model: forward(pixel_values) -> logits [batch, classes, h, w], a softmax per pixel.

    h, w: the resolution of the model's own output (a quarter of the input for SegFormer and Mask2Former). Whoever
    wants labels per pixel scales them up bilinearly, then takes the largest, as the metric does. Mask2Former's queries
    are combined as its own post-processing does: sum over queries of class probability times mask probability; the
    logarithm of that share is output.
    """

    output_layout: OutputLayout = "map"

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        if getattr(model, "criterion", None) is not None:
            model.register_module("criterion", None)  # the training loss, with buffers of its own

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        output = self.model(pixel_values)
        if isinstance(output, torch.Tensor):
            return output
        masks = output.get("masks_queries_logits")
        if masks is None:
            return output["out" if "out" in output else "logits"]
        classes = output.class_queries_logits.softmax(-1)[..., :-1]  # the last one is "no object"
        # Not sigmoid: onnxruntime's is exact to 1e-8, which is some per cent of the shares whose logarithm counts here.
        shares = classes.mT @ (-nn.functional.softplus(-masks)).exp().flatten(2)
        return shares.clamp(min=LEAST_SHARE).log().unflatten(2, masks.shape[-2:])


TaskModel = TextModel | ImageModel


def wrap(
    model: nn.Module,
    task: str,
    pooling: str | None = None,
    normalize: bool = False,
    sentence: Mapping[str, Any] | None = None,
) -> TaskModel:
    """The task's module around `model`, ready for inference: float32, eval mode, no gradients of the weights.

    sentence: of a model of sentence-transformers, its `steps` to the embedding, or the `activation` of its scores.
    """
    if task in ("image-classification", "zero-shot-image-classification", "image-feature-extraction"):
        wrapped: TaskModel = ImageModel(model, task == "image-feature-extraction", normalize)
    elif task == "image-segmentation":
        wrapped = SegmentationModel(model)
    else:
        wrapped = TextModel(model, task, pooling, normalize, sentence)
    return wrapped.float().eval().requires_grad_(False)


def refuse_merging(model: TaskModel) -> None:
    """Raises InputError for a model whose output cannot be computed from merged tokens."""
    reason = model.head.cannot_merge if isinstance(model, TextModel) and model.head is not None else None
    if reason is not None:
        raise InputError("the model's tokens cannot be merged", reason, "set tokens.keep: 1.0")


def as_rows(model: TaskModel, output: torch.Tensor, inputs: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """A task's output as [batch, rows, features], each row a prediction of its own (a distribution, for logits).

    The batch of `output` may hold the samples of `inputs` several times over, one copy after another.
    """
    if model.output_layout == "vector":
        return output[:, None]
    if model.output_layout == "map":
        return output.flatten(2).mT
    mask = inputs.get("attention_mask")
    if model.output_layout == "tokens" or mask is None:
        return output
    return output.masked_fill(~mask.bool().repeat(len(output) // len(mask), 1)[:, None], NEVER)


def counted_rows(model: TaskModel, output: torch.Tensor, inputs: Mapping[str, torch.Tensor]) -> torch.Tensor | None:
    """bool [batch, rows]: which rows of `as_rows` are predictions rather than padding; None if all are."""
    mask = inputs.get("attention_mask")
    return mask.bool() if model.output_layout == "tokens" and mask is not None else None


def as_function(model: nn.Module) -> Callable[[Mapping[str, np.ndarray]], np.ndarray]:
    """A task model as a function of named arrays: the reference its engine is compared with."""

    def function(inputs: Mapping[str, np.ndarray]) -> np.ndarray:
        with torch.no_grad():
            return model(**{name: torch.from_numpy(array) for name, array in inputs.items()}).numpy()

    return function
