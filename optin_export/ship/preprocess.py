"""`preprocess/` of a run: files that turn a client's text or image into inputs, without the model's sources."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from optin_export.data import pixels
from optin_export.data.batches import ImageProcessor, Processor, TextProcessor
from optin_export.errors import InputError
from optin_export.models.class_names import ClassNames
from optin_export.recipe import Recipe
from optin_export.workdir.files import atomic_path, write_json, write_text

TOKENIZER, IMAGE, LABELS, PROMPT = "tokenizer.json", "preprocess.json", "labels.txt", "prompt.txt"
#: Task -> how the tokenizer cuts a pair; other tasks take words or labels, which a client does not send.
_TRUNCATION = {
    "text-classification": "longest_first",
    "feature-extraction": "longest_first",
    "question-answering": "only_second",
    "fill-mask": "longest_first",
    "text-generation": "longest_first",
}
_CLASSES = ("text-classification", "image-classification", "zero-shot-image-classification", "audio-classification")


def write_preprocess(folder: Path, processor: Processor, names: ClassNames, recipe: Recipe) -> None:
    """Write tokenizer.json or preprocess.json, labels.txt if the classes have names, and prompt.txt if the model adds a
    prompt to every text; each atomically.

    names: the names of the model's classes, also used to look up labels of the evaluation data.

    Writes no tokenizer.json if the tokenizer has no fast form, or for tasks without plain text as input.
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
        write_json(folder / IMAGE, processor.config)
    if recipe.model.task in _CLASSES and names.real:
        # One line each, in the order of the outputs; a class without a name gets its index.
        lines = [" ".join(name.split()) or str(index) for index, name in enumerate(names.names)]
        write_text(folder / LABELS, "".join(f"{line}\n" for line in lines))
    else:
        (folder / LABELS).unlink(missing_ok=True)  # of an earlier model in the same folder


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


def check_served_image(config: dict[str, Any]) -> None:
    """Raises InputError for preprocessing that the server cannot do, KeyError or TypeError for a damaged file."""
    refused = config.get("refused")
    if refused is None:
        channels, height, width = config["input_size"]
        try:
            pixels.apply(np.zeros((height, width, channels), np.uint8), config)
        except ValueError as error:
            refused = str(error)
    if refused is not None:
        raise InputError(
            "ship.ensemble cannot preprocess these images", str(refused), "set ship.ensemble: false, and send pixels"
        )
