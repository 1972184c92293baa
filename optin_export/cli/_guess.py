"""Detect values for `init`: the task from the model's configuration, columns from the first line of a table."""

from __future__ import annotations

import re
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from optin_export.errors import InputError
from optin_export.sentence import (
    Files,
    SentenceFolder,
    find_sentence_folder,
    model_type_of,
    name_of,
    transformer_subfolder,
)
from optin_export.tables import ALIASES, read_head
from optin_export.workdir.files import read_json, regular

#: Tasks of folders with modules.json, by their model type.
_BY_SENTENCE = {"SentenceTransformer": "feature-extraction", "CrossEncoder": "text-classification"}
#: The order in which tasks are tried for a folder whose configuration does not name the model's class. The first one
#: that finds all its weights is taken, so tasks with a head come before plain encoders.
_TRIED = (
    "text-classification",
    "token-classification",
    "question-answering",
    "fill-mask",
    "text-generation",
    "image-classification",
    "image-segmentation",
    "zero-shot-image-classification",
    "object-detection",
    "depth-estimation",
    "audio-classification",
    "automatic-speech-recognition",
    "feature-extraction",
)
#: Columns that a task reads; labels come last.
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
    "object-detection": ("image",),
    "depth-estimation": ("image",),
    "audio-classification": ("audio", "label"),
    "automatic-speech-recognition": ("audio",),
}


def task_of(source: str) -> str | None:
    """The task of a local model folder, a hub model in the local cache, or a timm name; None if unknown."""
    prefix, _, _ = source.partition(":")
    if prefix == "timm":
        return "image-classification"
    try:
        sentence = _BY_SENTENCE.get(model_type_of(source) or "")
        config = {} if sentence is not None and not _has_configuration(source) else _configuration(source)
        named = [str(name) for name in config.get("architectures") or [""]]
        if sentence is not None:  # an old CrossEncoder does not say that it is one
            return "text-classification" if named[0].endswith("ForSequenceClassification") else sentence
        if "architecture" in config:  # a configuration of timm
            return "image-feature-extraction" if config.get("num_classes") == 0 else "image-classification"
        kind = config.get("model_type")
        if kind is None:
            return None
        from optin_export.models import task_of_class

        return task_of_class(kind, named[0]) or _task_of_weights(source)
    except (OSError, ValueError, AttributeError, TypeError, LookupError):
        return None  # not a folder, or a configuration without the class


def _has_configuration(source: str) -> bool:
    """Whether the transformer's config.json can be found; a folder of sentence-transformers may lack it."""
    try:
        return bool(_configuration(source))
    except (OSError, InputError):
        return False


def _task_of_weights(source: str) -> str | None:
    """The first task for which no weights are missing; None if the weights are not on this machine."""
    from pydantic import ValidationError

    from optin_export.errors import InputError
    from optin_export.models import Lookup, no_downloads
    from optin_export.models.loading import load_model
    from optin_export.recipe import ModelSection

    for task in _TRIED:
        lookup = Lookup()
        try:
            classes = {"classes": ["any"]} if task.startswith("zero-shot") else {}
            with no_downloads():
                load_model(ModelSection(source=_absolute(source), task=task, **classes), lookup=lookup)
        except (InputError, ValidationError):  # not this task
            continue
        if lookup.not_checked:
            return None
        return task
    return None


def _absolute(source: str) -> str:
    """A folder as an absolute path; other sources unchanged."""
    prefix, _, name = source.partition(":")
    path = Path(name if prefix == "hf" and name else source)
    return str(path.absolute()) if path.is_dir() else source


def sentence_of(source: str, task: str) -> tuple[SentenceFolder | None, int | None]:
    """The modules of a sentence-transformers folder, and the number of tokens at which it cuts texts, if any.

    Nothing is downloaded. Raises InputError for a module that cannot be built into the graph.
    """
    folder, _ = find_sentence_folder(source, task)
    if folder is None:
        return None, None
    given = folder.max_length
    if given is None:
        name = f"{folder.subfolder}/tokenizer_config.json" if folder.subfolder else "tokenizer_config.json"
        given = Files(folder.source, False).settings(name).get("model_max_length")
    return folder, int(given) if isinstance(given, int | float) and given < 10**9 else None


def _configuration(source: str) -> Any:
    """config.json of a folder or of the hub's local cache; with modules.json, that of its transformer."""
    files = Files(name_of(source) or source, False)
    folder = transformer_subfolder(files)
    path = files.find(f"{folder}/config.json" if folder else "config.json")
    if path is None:
        raise FileNotFoundError(f"{source} has no config.json")
    return read_json(path)


def columns_of(source: str, task: str, labelled: bool) -> dict[str, str | int]:
    """The positions of the task's columns, by names in the first line of the file; empty if it cannot be read.

    Raises:
        InputError: a column that the task needs has none of the known names.
    """
    prefix, _, path = source.partition(":")
    if prefix not in ("csv", "tsv", "npz"):
        return {}
    try:
        known = _names(prefix, Path(path))
    except (OSError, ValueError, zipfile.BadZipFile):
        return {}  # loading the data says why
    wanted = [name for name in COLUMNS[task] if labelled or name != "label"]
    found: dict[str, str | int] = {}
    for name in wanted:
        matches = [one for one in known if re.fullmatch(ALIASES[name], one.strip(), re.IGNORECASE)]
        own = [one for one in matches if one.strip().casefold() == name]
        if matches:
            found[name] = (own or matches)[0].strip()
    # Calibration needs single sentences only; a score compares pairs.
    missing = [name for name in wanted if name not in found and (labelled or name != "text_pair")]
    if missing:
        what = "arrays are" if prefix == "npz" else "first line reads"
        raise InputError(
            f"cannot find the column '{missing[0]}' in {source}",
            f"its {what} {', '.join(map(repr, known))[:300] or 'nothing'}",
            f"name it: --columns {','.join(f'{name}=NAME' for name in wanted)} (names, or positions from 0)",
        )
    return found


def names_of(source: str) -> Sequence[str]:
    """The columns of a table or the arrays of an archive; empty for other sources. Raises InputError."""
    prefix, _, path = source.partition(":")
    try:
        return _names(prefix, Path(path)) if prefix in ("csv", "tsv", "npz") else ()
    except (OSError, ValueError, zipfile.BadZipFile) as error:
        raise InputError(f"cannot read {source}", str(error), "correct the path") from None


def _names(prefix: str, path: Path) -> Sequence[str]:
    if prefix == "npz":
        with zipfile.ZipFile(regular(path)) as archive:
            return [name.removesuffix(".npy") for name in archive.namelist()]
    return read_head(path, "csv" if prefix == "csv" else "tsv")
