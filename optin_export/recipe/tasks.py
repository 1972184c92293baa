"""The tasks of a recipe and their metrics."""

from __future__ import annotations

from typing import Literal

Task = Literal[
    "text-classification",
    "feature-extraction",
    "token-classification",
    "question-answering",
    "fill-mask",
    "text-generation",
    "image-classification",
    "image-feature-extraction",
    "zero-shot-image-classification",
    "image-segmentation",
    "object-detection",
    "depth-estimation",
    "audio-classification",
    "automatic-speech-recognition",
]
Metric = Literal["accuracy", "f1", "spearman", "pearson", "squad_f1", "exact_match", "perplexity", "mean_iou", "wer"]
TEXT_TASKS = (
    "text-classification",
    "feature-extraction",
    "token-classification",
    "question-answering",
    "fill-mask",
    "text-generation",
)
#: Tasks whose labels the built-in fine-tune can train on: one class, or one number, per row.
LABELLED = ("text-classification", "image-classification", "zero-shot-image-classification", "audio-classification")
METRICS: dict[str, tuple[str, ...]] = {
    "text-classification": ("accuracy", "f1", "spearman", "pearson"),  # the correlations for models of one output
    "feature-extraction": ("spearman", "pearson"),
    "token-classification": ("accuracy", "f1"),
    "question-answering": ("squad_f1", "exact_match"),
    "fill-mask": ("accuracy", "perplexity"),
    "text-generation": ("accuracy", "perplexity"),
    "image-classification": ("accuracy",),
    "image-feature-extraction": (),
    "zero-shot-image-classification": ("accuracy",),
    "image-segmentation": ("mean_iou",),
    "object-detection": (),
    "depth-estimation": (),
    "audio-classification": ("accuracy", "f1"),
    "automatic-speech-recognition": ("wer",),
}
