"""What a first recipe knows without being told: task and longest sequence by a model's configuration, columns by a
file's head."""

from __future__ import annotations

import csv
import json
import re
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from optin_export.sentence import (
    Files,
    SentenceFolder,
    find_sentence_folder,
    model_type_of,
    name_of,
    transformer_subfolder,
)

#: The longest sequence that is proposed: longer ones make latency that of padding, for most texts.
MOST_TOKENS = 512
#: What a folder with modules.json is for, by what it says it is.
_BY_SENTENCE = {"SentenceTransformer": "feature-extraction", "CrossEncoder": "text-classification"}
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
#: Other names that a column goes by.
_ALIASES = {
    "text": r"text|sentence|sentence1|review|content|query",
    "text_pair": r"text_pair|sentence2|text2|pair",
    "tokens": r"tokens|words",
    "question": r"question",
    "context": r"context|passage",
    "image": r"images?|pixels|x",
    "label": r"labels?|target|score|class|answers?|masks?|y|tags|ner_tags",
}


def task_of(source: str) -> str | None:
    """The task of a local model folder, a hub model in the local cache, or a timm name; None if it cannot be told."""
    prefix, _, _ = source.partition(":")
    if prefix == "timm":
        return "image-classification"
    try:
        config = _configuration(source)
        named, kind = config.get("architectures") or [""], config.get("model_type")
        if "architecture" in config:  # timm's own
            return "image-classification"
        told = _BY_SENTENCE.get(model_type_of(source) or "")
        if told is not None:
            return told
        for ending, task in _BY_CLASS.items():
            if str(named[0]).endswith(ending):
                return task
        return "feature-extraction" if kind in _ENCODERS else _BY_TYPE.get(kind)
    except (OSError, ValueError, AttributeError, TypeError, LookupError):
        return None  # no folder, or a configuration that says nothing


def positions_of(source: str) -> int | None:
    """The longest sequence in tokens that a model's configuration has positions for; None if it does not say."""
    try:
        config = _configuration(source)
        positions = next(config[name] for name in _POSITIONS if config.get(name) is not None)
        # RoBERTa and its like count from behind the padding token's number.
        taken = config["pad_token_id"] + 1 if config.get("model_type") in _BEHIND_PADDING else 0
        return positions - taken if isinstance(positions, int) and positions > taken else None
    except (OSError, ValueError, AttributeError, TypeError, LookupError, StopIteration):
        return None


def sentence_of(source: str, task: str) -> tuple[SentenceFolder | None, int | None]:
    """What a folder of sentence-transformers says about its output, and the tokens at which it cuts texts, if any.

    Nothing is downloaded. Raises InputError for a module that cannot be built into the graph.
    """
    folder, _ = find_sentence_folder(source, task)
    if folder is None:
        return None, None
    given = folder.max_length
    if given is None:
        name = f"{folder.subfolder}/tokenizer_config.json" if folder.subfolder else "tokenizer_config.json"
        given = Files(folder.source, False).settings(name).get("model_max_length")
    limits = [one for one in (given, positions_of(source)) if isinstance(one, int | float) and one < 10**9]
    return folder, int(min(limits)) if limits else None


def _configuration(source: str) -> Any:
    """config.json in a folder or in the hub's local cache; that of the transformer, where modules.json names one."""
    files = Files(name_of(source) or source, False)
    folder = transformer_subfolder(files)
    path = files.find(f"{folder}/config.json" if folder else "config.json")
    if path is None:
        raise FileNotFoundError(f"{source} has no config.json")
    return json.loads(path.read_text(encoding="utf-8"))


def columns_of(source: str, task: str, labelled: bool) -> dict[str, str | int]:
    """Where the task's columns are, by the names in the file's head; empty if the names are already ours or unknown."""
    prefix, _, path = source.partition(":")
    try:
        known = _names(prefix, Path(path))
    except (OSError, ValueError, csv.Error, zipfile.BadZipFile):
        return {}
    wanted = [name for name in COLUMNS[task] if labelled or name != "label"]
    found: dict[str, str | int] = {}
    for name in wanted:
        match = next((one for one in known if re.fullmatch(_ALIASES[name], one, re.IGNORECASE)), None)
        if match is not None:
            found[name] = match
    return {} if all(key == value for key, value in found.items()) else found


def _names(prefix: str, path: Path) -> Sequence[str]:
    if prefix == "npz":
        with zipfile.ZipFile(path) as archive:
            return [name.removesuffix(".npy") for name in archive.namelist()]
    if prefix in ("csv", "tsv"):
        with path.open(encoding="utf-8", newline="") as file:
            line = file.readline(10_000)
        return next(csv.reader([line], delimiter="," if prefix == "csv" else "\t"), [])
    return []
