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
Metric = Literal[
    "accuracy",
    "f1",
    "f1_binary",
    "mcc",
    "auc",
    "top5",
    "spearman",
    "pearson",
    "recall@1",
    "recall@5",
    "recall@10",
    "ndcg@10",
    "squad_f1",
    "exact_match",
    "perplexity",
    "mean_iou",
    "wer",
]
#: Metrics of which less is better.
_LOWER = ("perplexity", "wer")
#: The user's own metric; more of it is better.
OWN_METRIC = r"^py:.+:[A-Za-z_]\w*$"
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
_CLASSES = ("accuracy", "f1", "f1_binary", "mcc", "auc", "top5")
_CORRELATIONS = ("spearman", "pearson")
METRICS: dict[str, tuple[str, ...]] = {
    "text-classification": (*_CLASSES, *_CORRELATIONS),  # these for models of one output
    "feature-extraction": (*_CORRELATIONS, "recall@1", "recall@5", "recall@10", "ndcg@10"),
    "token-classification": ("accuracy", "f1"),
    "question-answering": ("squad_f1", "exact_match"),
    "fill-mask": ("accuracy", "perplexity"),
    "text-generation": ("accuracy", "perplexity"),
    "image-classification": _CLASSES,
    "image-feature-extraction": (),
    "zero-shot-image-classification": _CLASSES,
    "image-segmentation": ("mean_iou",),
    "object-detection": (),
    "depth-estimation": (),
    "audio-classification": _CLASSES,
    "automatic-speech-recognition": ("wer",),
}


def is_lower_better(metric: str) -> bool:
    """Whether less of a metric is better."""
    return metric in _LOWER
