"""What a first recipe knows without being told: task and longest sequence by a model's configuration, columns by a
file's head."""

from __future__ import annotations

import re
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from optin_export.errors import InputError
from optin_export.files import read_json, regular
from optin_export.tables import ALIASES, read_head

#: How the name of a model's class ends -> its task.
_BY_CLASS = {
    "ForSequenceClassification": "text-classification",
    "ForTokenClassification": "token-classification",
    "ForQuestionAnswering": "question-answering",
    "ForMaskedLM": "fill-mask",
    "ForCausalLM": "text-generation",
    "LMHeadModel": "text-generation",
    "ForImageClassification": "image-classification",
    "ForSemanticSegmentation": "image-segmentation",
    "ForUniversalSegmentation": "image-segmentation",
}
#: Models of two towers, and plain encoders that give an embedding.
_BY_TYPE = {"clip": "zero-shot-image-classification", "siglip": "zero-shot-image-classification"}
_ENCODERS = ("bert", "distilbert", "mpnet", "roberta", "xlm-roberta")
#: What configurations call the longest sequence, and which kinds lose places to the padding token.
_POSITIONS = ("max_position_embeddings", "n_positions")
_BEHIND_PADDING = ("camembert", "mpnet", "roberta", "xlm-roberta")
#: Columns that a task reads; the last is its labels, where it has any.
COLUMNS = {
    "text-classification": ("text", "label"),
    "feature-extraction": ("text", "text_pair", "label"),
    "token-classification": ("tokens", "label"),
    "question-answering": ("question", "context", "label"),
    "fill-mask": ("text",),
    "text-generation": ("text",),
    "image-classification": ("image", "label"),
    "image-feature-extraction": ("image",),
    "zero-shot-image-classification": ("image", "label"),
    "image-segmentation": ("image", "label"),
}


def task_of(source: str) -> str | None:
    """The task of a local model folder, a hub model in the local cache, or a timm name; None if it cannot be told."""
    prefix, _, _ = source.partition(":")
    if prefix == "timm":
        return "image-classification"
    try:
        path, config = _configuration(source)
        named, kind = config.get("architectures") or [""], config.get("model_type")
        if "architecture" in config:  # timm's own
            return "image-classification"
        if (path.parent / "modules.json").is_file():  # sentence-transformers
            return "feature-extraction"
        for ending, task in _BY_CLASS.items():
            if str(named[0]).endswith(ending):
                return task
        return "feature-extraction" if kind in _ENCODERS else _BY_TYPE.get(kind)
    except (OSError, ValueError, AttributeError, TypeError, LookupError):
        return None  # no folder, or a configuration that says nothing


def positions_of(source: str) -> int | None:
    """The longest sequence in tokens that a model's configuration has positions for; None if it does not say."""
    try:
        _, config = _configuration(source)
        positions = next(config[name] for name in _POSITIONS if config.get(name) is not None)
        # RoBERTa and its like count from behind the padding token's number.
        taken = config["pad_token_id"] + 1 if config.get("model_type") in _BEHIND_PADDING else 0
        return positions - taken if isinstance(positions, int) and positions > taken else None
    except (OSError, ValueError, AttributeError, TypeError, LookupError, StopIteration):
        return None


def _configuration(source: str) -> tuple[Path, Any]:
    """config.json and where it is, in a folder or in the hub's local cache."""
    prefix, _, name = source.partition(":")
    path = Path(name if prefix == "hf" and name else source) / "config.json"
    if not path.is_file() and prefix == "hf":
        from huggingface_hub import try_to_load_from_cache

        found = try_to_load_from_cache(name, "config.json")
        path = Path(found) if isinstance(found, str) else path
    return path, read_json(path)


def columns_of(source: str, task: str, labelled: bool) -> dict[str, str | int]:
    """Where the task's columns are, by the names in the file's head; empty if the file cannot be looked into.

    Raises InputError for a table or an archive that can be, and has no column of a known name.
    """
    prefix, _, path = source.partition(":")
    if prefix not in ("csv", "tsv", "npz"):
        return {}
    try:
        known = _names(prefix, Path(path))
    except (OSError, ValueError, zipfile.BadZipFile):
        return {}  # the run says why
    wanted = [name for name in COLUMNS[task] if labelled or name != "label"]
    found: dict[str, str | int] = {}
    for name in wanted:
        matches = [one for one in known if re.fullmatch(ALIASES[name], one.strip(), re.IGNORECASE)]
        own = [one for one in matches if one.strip().casefold() == name]
        if matches:
            found[name] = (own or matches)[0].strip()
    missing = [name for name in wanted if name not in found]
    if missing:
        what = "arrays are" if prefix == "npz" else "first line reads"
        raise InputError(
            f"cannot tell which column of {source} is '{missing[0]}'",
            f"its {what} {', '.join(map(repr, known))[:300] or 'nothing'}",
            f"say so: --columns {','.join(f'{name}=NAME' for name in wanted)} (names, or positions from 0)",
        )
    return found


def _names(prefix: str, path: Path) -> Sequence[str]:
    if prefix == "npz":
        with zipfile.ZipFile(regular(path)) as archive:
            return [name.removesuffix(".npy") for name in archive.namelist()]
    return read_head(path, "csv" if prefix == "csv" else "tsv")
