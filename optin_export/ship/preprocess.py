"""`preprocess/` of a run: what turns a client's text or image into the model's inputs, without the model's sources."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from optin_export.errors import InputError
from optin_export.files import atomic_path, write_json, write_text
from optin_export.recipe import Recipe
from optin_export.sources.batches import ImageProcessor, Processor, TextProcessor

TOKENIZER, IMAGE, LABELS, PROMPT = "tokenizer.json", "preprocess.json", "labels.txt", "prompt.txt"
#: Task -> how the tokenizer cuts a pair; tasks that are not here take words or labels that no client would send.
_TRUNCATION = {
    "text-classification": "longest_first",
    "feature-extraction": "longest_first",
    "question-answering": "only_second",
    "fill-mask": "longest_first",
    "text-generation": "longest_first",
}
_CLASSES = ("text-classification", "image-classification", "zero-shot-image-classification")


def write_preprocess(folder: Path, processor: Processor, model: Any, recipe: Recipe) -> None:
    """Write tokenizer.json or preprocess.json, labels.txt where the classes have names, and prompt.txt where the model
    puts a prompt before every text; each whole or not at all.

    A tokenizer that has no fast form, and tasks that no client sends plain text for, leave none.
    """
    if isinstance(processor, TextProcessor):
        fast = getattr(processor.tokenizer, "backend_tokenizer", None)
        if fast is not None and recipe.model.task in _TRUNCATION:
            with atomic_path(folder / TOKENIZER) as temporary:
                _served(processor, fast, recipe.model.task).save(str(temporary))
        (folder / PROMPT).unlink(missing_ok=True)
        if processor.prompt:
            write_text(folder / PROMPT, processor.prompt)
    elif isinstance(processor, ImageProcessor):
        names = ("input_size", "interpolation", "crop_mode", "crop_pct", "mean", "std")
        write_json(folder / IMAGE, {name: processor.config[name] for name in names if name in processor.config})
    labels = _labels(model, recipe)
    if labels:
        write_text(folder / LABELS, "".join(f"{label}\n" for label in labels))


def _served(processor: TextProcessor, fast: Any, task: str) -> Any:
    """A copy of the tokenizer that cuts and pads as `processor` does."""
    from tokenizers import Tokenizer

    tokenizer, own = Tokenizer.from_str(fast.to_str()), processor.tokenizer
    side = getattr(own, "truncation_side", "right")
    tokenizer.enable_truncation(processor.longest, strategy=_TRUNCATION[task], direction=side)
    tokenizer.enable_padding(
        direction="right",
        pad_id=own.pad_token_id,
        pad_type_id=getattr(own, "pad_token_type_id", 0),
        pad_token=own.pad_token,
        length=processor.sequence if processor.full else None,
    )
    return tokenizer


def _labels(model: Any, recipe: Recipe) -> list[str]:
    """Class names of the first output, if it is one value per class and they have names of their own."""
    if recipe.model.task not in _CLASSES:
        return []
    classes = recipe.model.classes
    if classes is not None:
        return list(classes) if not isinstance(classes, str) else _lines(Path(classes))
    names = getattr(getattr(model, "config", None), "id2label", None) or {}
    ordered = [str(names[index]) for index in sorted(names)]
    generic = all(name == f"LABEL_{index}" for index, name in enumerate(ordered))
    return [] if generic else [" ".join(name.split()) for name in ordered]


def _lines(path: Path) -> list[str]:
    return [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]


def check_served_image(config: dict[str, Any]) -> None:
    """Raises InputError for preprocessing that the served model file does not do."""
    _, height, width = config["input_size"]
    mode, how = config.get("crop_mode", "center"), config.get("interpolation", "bilinear")
    if mode not in ("squash", "center") or (mode == "center" and height != width):
        raise InputError(
            "ship.ensemble cannot prepare these images",
            f"crop_mode {mode} to {height} x {width} is not done in the server",
            "send prepared pixels: ship.ensemble: false",
        )
    if how not in ("nearest", "bilinear", "bicubic"):
        raise InputError(
            "ship.ensemble cannot prepare these images",
            f"interpolation {how} is not done in the server",
            "set model.preprocess.interpolation",
        )
