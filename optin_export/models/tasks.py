"""One module per kind of task, from named tensors to one named tensor; these modules are scored and exported."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal

import numpy as np
import torch
from torch import nn

from optin_export.errors import InputError
from optin_export.models.arguments import takes
from optin_export.models.audio import AudioModel
from optin_export.models.backbones import embedding
from optin_export.models.contrastive import TextTower
from optin_export.models.end_token import logits_at_end_token, reads_end_token
from optin_export.models.logits import logits_of
from optin_export.models.sentence import SentenceHead, make_activation, plain_steps
from optin_export.recipe import IGNORED as IGNORED

#: Task inputs by argument name, each a tensor whose first dimension is the batch.
Inputs = dict[str, torch.Tensor]
OutputKind = Literal["logits", "regression", "embedding"]
#: Layout of a task's output: [batch, features]; per token [batch, tokens, features]; per question [batch, 2, tokens]
#: (start and end); per pixel [batch, features, height, width].
OutputLayout = Literal["vector", "tokens", "spans", "map"]
#: Logit at padding positions.
NEVER = -1e4
#: Smallest share of a class in a pixel that is distinguished.
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
    `sentence_embedding` [batch, hidden], `scores` (a CrossEncoder with an activation) or `logits`: [batch, classes];
    per token, [batch, sequence, classes or vocabulary]; for question answering, [batch, 2, sequence] (start, end).

    head: from token states to the embedding; None without one, or if the model does its own pooling.
    reads_mask: false for an encoder that treats padding like any other text; it takes no attention_mask.
    """

    #: For merged tokens: returns the weight of each remaining token in a mean, [batch, tokens].
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
        self.reads_mask = not (isinstance(model, TextTower) and model.pad is not None) and takes(
            model, "attention_mask"
        )
        self.names_ids = takes(model, "input_ids")
        self.pooling, self.reads_end_token = pooling, reads_end_token(model)
        self.normalize = normalize  # for a model that does its own pooling; otherwise the head's last step normalises
        if self.head is not None and getattr(model, "pooler", None) is not None:
            model.register_module("pooler", None)  # the pooler's output is not used: do not count, ship or compute it
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
        if self.reads_end_token:
            return logits_at_end_token(self.model, input_ids, attention_mask)
        segments: dict[str, Any] = {} if token_type_ids is None else {"token_type_ids": token_type_ids}
        if self.reads_mask or attention_mask is not None:
            segments["attention_mask"] = attention_mask
        output = self.model(input_ids=input_ids, **segments) if self.names_ids else self.model(input_ids, **segments)
        if self.output_layout == "spans":
            return torch.stack([output.start_logits, output.end_logits], 1)
        if isinstance(output, torch.Tensor):
            return nn.functional.normalize(output, dim=-1) if self.normalize else output
        if self.head is None:
            return logits_of(output) if self.activation is None else self.activation(logits_of(output))
        pooled = self._pooled(output)
        if pooled is not None:
            return pooled
        counts = attention_mask if self.token_weights is None else self.token_weights()
        if counts is None:
            counts = torch.ones_like(input_ids)
        return self.head(output.last_hidden_state, counts)

    def _pooled(self, output: Mapping[str, torch.Tensor]) -> torch.Tensor | None:
        """The embedding of a model that pools its states itself (DPR, a text encoder with a projection), or None."""
        states = output.get("last_hidden_state")
        found = output.get("pooler_output") if states is None else None
        found = output.get("text_embeds", found)
        if found is None or (self.pooling is not None and states is not None):
            return None
        if self.pooling is not None:
            raise ValueError(f"model.pooling is {self.pooling}, but the model gives one vector per text: leave it out")
        return nn.functional.normalize(found, dim=-1) if self.normalize else found


class ImageModel(nn.Module):
    """An image model of any library: forward(pixel_values [batch, channels, H, W]) -> `logits` [batch, classes], or
    `image_embedding` for a model that has no classes: [batch, hidden]; [batch, tokens, hidden] or [batch, hidden, h, w]
    for a transformers model whose library does not pool its last hidden states (layout: tokens, map)."""

    def __init__(
        self, model: nn.Module, embeds: bool = False, normalize: bool = False, layout: OutputLayout = "vector"
    ) -> None:
        super().__init__()
        self.model, self.output_layout = model, layout
        self.normalize = embeds and normalize
        self.output_name = "image_embedding" if embeds else "logits"
        self.output_kind: OutputKind = "embedding" if embeds else "logits"

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        output = self.model(pixel_values)
        if isinstance(output, torch.Tensor):
            result = output
        else:
            result = embedding(output, self.output_layout) if self.output_kind == "embedding" else logits_of(output)
        axis = 1 if self.output_layout == "map" else -1
        return nn.functional.normalize(result, dim=axis) if self.normalize else result


class SegmentationModel(ImageModel):
    """A semantic segmentation model: forward(pixel_values) -> logits [batch, classes, h, w], a softmax per pixel.

    h, w: the resolution of the model's own output (a quarter of the input for SegFormer and Mask2Former). For labels
    per pixel, scale the logits up bilinearly, then take the argmax, as the metric does. Mask2Former's queries are
    combined as in its own post-processing: the sum over queries of class probability times mask probability; the
    output is the logarithm of that share.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model, layout="map")
        if getattr(model, "criterion", None) is not None:
            model.register_module("criterion", None)  # the training loss, which has its own buffers

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        output = self.model(pixel_values)
        masks = output.get("masks_queries_logits") if isinstance(output, Mapping) else None
        if masks is None:
            return logits_of(output)
        classes = output.class_queries_logits.softmax(-1)[..., :-1]  # the last one is "no object"
        # Not sigmoid: onnxruntime's error of 1e-8 is a few per cent of the smallest shares before the logarithm.
        shares = classes.mT @ (-nn.functional.softplus(-masks)).exp().flatten(2)
        return shares.clamp(min=LEAST_SHARE).log().unflatten(2, masks.shape[-2:])


class DetectionModel(ImageModel):
    """An object detector of transformers: forward(pixel_values) -> `detections` [batch, queries, classes + 4].

    A query's features are its class logits, then its box (centre x, centre y, width, height in 0..1): one row per
    query, so that a class and its box are compared together. Rows are compared as embeddings, without a metric.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model, layout="tokens")
        self.output_name, self.output_kind = "detections", "embedding"

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        output = self.model(pixel_values)
        return torch.cat([output.logits, output.pred_boxes], -1)


class DepthModel(ImageModel):
    """A depth model of transformers: forward(pixel_values) -> `predicted_depth` [batch, 1, h, w].

    Every pixel is a row of one number, compared as a regression: the cosine of one number would be its sign.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model, layout="map")
        self.output_name, self.output_kind = "predicted_depth", "regression"

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        output = self.model(pixel_values)
        depth: torch.Tensor = output if isinstance(output, torch.Tensor) else output.predicted_depth
        return depth[:, None] if depth.dim() == 3 else depth


TaskModel = TextModel | ImageModel | AudioModel
#: Tasks of an `AudioModel`.
AUDIO_TASKS = ("audio-classification", "automatic-speech-recognition")


def wrap(
    model: nn.Module,
    task: str,
    pooling: str | None = None,
    normalize: bool = False,
    sentence: Mapping[str, Any] | None = None,
    encoder: bool = False,
    layout: OutputLayout = "vector",
) -> TaskModel:
    """The task's module around `model`, ready for inference: float32, eval mode, no gradients of the weights.

    sentence: for a sentence-transformers model, its `steps` to the embedding, or the `activation` of its scores.
    encoder: `model` is the encoder of a model with a decoder. layout: that of an image's embedding.
    """
    if task in ("image-classification", "zero-shot-image-classification", "image-feature-extraction"):
        wrapped: TaskModel = ImageModel(model, task == "image-feature-extraction", normalize, layout)
    elif task == "image-segmentation":
        wrapped = SegmentationModel(model)
    elif task == "object-detection":
        wrapped = DetectionModel(model)
    elif task == "depth-estimation":
        wrapped = DepthModel(model)
    elif task in AUDIO_TASKS:
        wrapped = AudioModel(model, task, encoder)
    else:
        wrapped = TextModel(model, task, pooling, normalize, sentence)
    return wrapped.float().eval().requires_grad_(False)


def refuse_merging(model: TaskModel) -> None:
    """Raises InputError for a model whose output cannot be computed from merged tokens."""
    reason = model.head.cannot_merge if isinstance(model, TextModel) and model.head is not None else None
    if reason is not None:
        raise InputError("the model's tokens cannot be merged", reason, "set tokens.keep: 1.0")


def as_rows(model: TaskModel, output: torch.Tensor, inputs: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """A task's output as [batch, rows, features], each row a separate prediction (a distribution, for logits).

    The batch of `output` may be a repetition of the samples of `inputs`, one copy after another.
    """
    if model.output_layout == "vector":
        return output[:, None]
    if model.output_layout == "map":
        return output.flatten(2).mT
    mask = inputs.get("attention_mask")
    if model.output_layout == "tokens" or mask is None:
        return output
    mask = mask.to(output.device)
    return output.masked_fill(~mask.bool().repeat(len(output) // len(mask), 1)[:, None], NEVER)


def counted_rows(model: TaskModel, output: torch.Tensor, inputs: Mapping[str, torch.Tensor]) -> torch.Tensor | None:
    """bool [batch, rows]: which rows of `as_rows` are predictions rather than padding; None if all are."""
    mask = inputs.get("attention_mask")
    if model.output_layout != "tokens" or mask is None:
        return None
    mask = mask.to(output.device)
    return model.frames(mask, output.shape[1]) if isinstance(model, AudioModel) else mask.bool()


def block_inputs(model: TaskModel, inputs: Inputs) -> Inputs:
    """The inputs, their attention mask as long as the blocks' tokens: per frame for a model of raw sound."""
    mask = inputs.get("attention_mask")
    if mask is None or not isinstance(model, AudioModel):
        return inputs
    return {**inputs, "attention_mask": model.block_mask(mask)}


def class_axis(model: TaskModel) -> int | None:
    """The axis of the classes in a task's output; None if the output is not a choice of classes."""
    if model.output_kind != "logits":
        return None
    return 1 if model.output_layout == "map" else -1


def as_function(model: nn.Module) -> Callable[[Mapping[str, np.ndarray]], np.ndarray]:
    """A task model as a function of named arrays, the reference with which its engine is compared."""

    def function(inputs: Mapping[str, np.ndarray]) -> np.ndarray:
        with torch.no_grad():
            return model(**{name: torch.from_numpy(array) for name, array in inputs.items()}).numpy()

    return function
