"""transformers architectures by `model_type`: configurations without a checkpoint, and the tasks of model classes."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import Any

from optin_export.errors import InputError

#: `hf:model_type=bert`: a transformers architecture without a checkpoint.
BY_TYPE = "model_type="
#: The transformers class that finds the model class of a task.
AUTO_CLASS = {
    "feature-extraction": "AutoModel",
    "text-classification": "AutoModelForSequenceClassification",
    "token-classification": "AutoModelForTokenClassification",
    "question-answering": "AutoModelForQuestionAnswering",
    "fill-mask": "AutoModelForMaskedLM",
    "text-generation": "AutoModelForCausalLM",
    "image-classification": "AutoModelForImageClassification",
    "image-feature-extraction": "AutoModel",
    "zero-shot-image-classification": "AutoModelForZeroShotImageClassification",
    "image-segmentation": "AutoModelForSemanticSegmentation",
    "object-detection": "AutoModelForObjectDetection",
    "depth-estimation": "AutoModelForDepthEstimation",
    "audio-classification": "AutoModelForAudioClassification",
    "automatic-speech-recognition": "AutoModelForCTC",
}
#: The class for configurations that a task's `AUTO_CLASS` does not know.
_OTHERWISE = {
    "image-segmentation": "AutoModelForUniversalSegmentation",
    "automatic-speech-recognition": "AutoModelForSpeechSeq2Seq",
}


def auto_class(config: Any, task: str) -> Any:
    """The transformers class that makes the model of a task from this configuration."""
    import transformers

    auto = getattr(transformers, AUTO_CLASS[task])
    if task in _OTHERWISE and type(config) not in auto._model_mapping:
        return getattr(transformers, _OTHERWISE[task])
    return auto


def config_of_type(name: str, fields: Mapping[str, Any]) -> Any:
    """The configuration of an architecture by its `model_type`, with these fields; nothing is downloaded."""
    import transformers

    known = sorted(transformers.CONFIG_MAPPING.keys())
    if name not in known:
        near = difflib.get_close_matches(name, known, n=3)
        hint = f": {', '.join(near)}" if near else ""
        raise InputError(
            f"cannot create the model 'hf:{BY_TYPE}{name}'",
            f"transformers {transformers.__version__} has no such model_type",
            f"use one of its types{hint}",
        )
    # A configuration accepts any field: one that a fresh configuration does not have is a mistake.
    fresh = transformers.AutoConfig.for_model(name)
    unknown = next((field for field in fields if not hasattr(fresh, field)), None)
    if unknown is not None:
        names = [field for field in fresh.to_dict() if not field.startswith("_")]
        near = difflib.get_close_matches(unknown, names, n=3) or names[:5]
        raise InputError(
            f"model.args.{unknown} is not a field of '{name}'",
            f"{type(fresh).__name__} does not have it",
            f"use one of its fields, such as {', '.join(near)}",
        )
    return transformers.AutoConfig.for_model(name, **fields)


def task_of_class(kind: str, name: str) -> str | None:
    """The task whose transformers auto class maps this model type to this class."""
    import transformers

    autos = [
        (task, auto)
        for task, auto in AUTO_CLASS.items()
        if task not in ("feature-extraction", "image-feature-extraction")
    ]
    for task, auto in [
        *_OTHERWISE.items(),
        ("feature-extraction", "AutoModelForSeq2SeqLM"),  # its encoder
        *autos,
        ("feature-extraction", "AutoModel"),
    ]:
        stands_for = getattr(transformers, auto)._model_mapping._model_mapping.get(kind, ())
        if name in ((stands_for,) if isinstance(stands_for, str) else stands_for):
            if task != "feature-extraction":
                return task
            reads = getattr(getattr(transformers, name, None), "main_input_name", "input_ids")
            return {"pixel_values": "image-feature-extraction", "input_ids": task}.get(reads)
    return None
