"""Rows that are already in memory: batches as a training loop has them, or texts for a tokenizer."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import torch
from torch import nn

from optin_export.data.readers import Column, Examples, refuse_bad_values
from optin_export.data.rows import AUDIO, COLUMNS
from optin_export.errors import InputError

#: Arguments of a text model that are supported; others are refused.
MASK = "attention_mask"
TOKENS = ("input_ids", MASK, "token_type_ids")
PIXELS = "pixel_values"
#: What a feature extractor of sound returns, besides an attention mask.
SOUNDS = ("input_values", "input_features")
#: What labels are called in a batch that is a dictionary.
LABELS = ("label", "labels", "label_ids", "target", "targets", "y")
#: A batch: values of each of its rows by column.
Rows = dict[str, list[Any]]


def given_rows(
    data: Any, task: str, module: nn.Module, samples: int | None = None, name: str = "the data", labelled: bool = False
) -> Examples:
    """The rows of a loader, a list of batches or rows, or one tensor, array or dictionary that holds them all.

    Args:
        data: its items are batches or single rows: tensors, arrays, texts, (inputs, label), or dictionaries.
        task: the recipe's `model.task`; determines whether rows are texts, images or sound.
        module: the user's model.
        samples: number of rows to take, from the start; later rows are not read.
        name: the name of the data in error messages.
        labelled: whether every row must have a label, which is kept in the column `label`.

    Returns rows with the column `pixel_values` (array [rows, ...]), one of SOUNDS, perhaps with a mask (arrays [rows,
    ...]), the columns TOKENS (lists of int64 [tokens], without padding), or those that the task's tokenizer reads.
    Raises InputError for data in any other form.
    """
    found: Rows = {}
    for number, item in enumerate(_items(data, name)):
        rows = _batch(item, task, module, f"item {number} of {name}", labelled)
        if found and found.keys() != rows.keys():
            raise InputError(
                f"the items of {name} differ in kind",
                f"item 0 has {', '.join(found)}, item {number} has {', '.join(rows)}",
                "give items of one kind",
            )
        for column, values in rows.items():
            found.setdefault(column, []).extend(values)
        if samples is not None and len(next(iter(found.values()))) >= samples:
            break
    count = len(next(iter(found.values()), ()))
    if count == 0:
        raise InputError(f"{name} is empty", "it gave no row", "give some hundred rows; a generator is read only once")
    found = {column: values[:samples] for column, values in found.items()}
    stacked = (*SOUNDS, MASK) if task in AUDIO else (PIXELS,)
    if "input_ids" in found:
        found = _without_padding(found, name)
    columns: dict[str, Column] = {
        column: _stacked(values, name) if column in stacked else values for column, values in found.items()
    }
    examples = Examples(columns, places=np.arange(min(count, samples or count)))
    refuse_bad_values(examples, name)
    return examples


def _items(data: Any, name: str) -> Iterable[Any]:
    if isinstance(data, torch.Tensor | np.ndarray | Mapping):
        return [data]
    if isinstance(data, str) or not (isinstance(data, Iterable) or hasattr(data, "__getitem__")):
        raise InputError(
            f"{name} cannot be read",
            f"it is a {type(data).__name__}",
            "give a DataLoader, or a list of batches, rows or texts",
        )
    return data if isinstance(data, Iterable) else (data[index] for index in range(len(data)))


def _batch(item: Any, task: str, module: nn.Module, where: str, labelled: bool) -> Rows:
    """The rows of one item, which may be a single row."""
    inputs, label = _apart(item)
    if task in AUDIO:
        rows = _sounds(inputs, module, where)
    else:
        rows = _texts(inputs, task, where) if task in COLUMNS else _images(inputs, module, where)
    ignored = inspect.signature(module.forward).parameters.keys() & inputs.keys() - {*rows, *TOKENS, PIXELS}
    unread = sorted(key for key in ignored if "label" not in key and not key.endswith("_positions"))
    if unread:
        raise InputError(
            f"{where} has '{unread[0]}', which is not read",
            f"a model of the task {task} is pruned, and exported, with {', '.join(rows)} alone",
            f"leave it out if the model's outputs are right without '{unread[0]}'",
        )
    count = len(next(iter(rows.values())))
    if labelled:
        if label is None:
            raise InputError(
                f"{where} has no label", "accuracy is measured by them", "give (inputs, labels), or a key 'label'"
            )
        given = label.tolist() if isinstance(label, torch.Tensor | np.ndarray) else label
        rows["label"] = list(given) if isinstance(given, list | tuple) else [given]
    wrong = next((column for column, values in rows.items() if len(values) != count), None)
    if wrong is not None:
        raise InputError(
            f"the parts of {where} differ in length",
            f"{count} rows, but {len(rows[wrong])} in '{wrong}'",
            "give one of each per row",
        )
    return rows


def _apart(item: Any) -> tuple[Mapping[str, Any], Any]:
    """Split an item into its inputs by name ("" for an unnamed input) and its label."""
    if isinstance(item, Mapping):
        return item, next((item[name] for name in LABELS if name in item), None)
    if _is_text(item):
        return {"text": item}, None
    if isinstance(item, list | tuple) and len(item):
        if len(item) == 2 and all(map(_is_text, item)):
            return {"text": item[0], "text_pair": item[1]}, None
        inputs, label = _apart(item[0])
        return inputs, item[1] if len(item) > 1 else label
    return {"": item}, None


def _is_text(value: Any) -> bool:
    """Whether this is a text, or a batch of them; a pair of texts is a tuple."""
    if isinstance(value, str):
        return True
    many = isinstance(value, list) or (isinstance(value, tuple) and len(value) != 2)
    return many and len(value) > 0 and all(isinstance(one, str) for one in value)


def _texts(inputs: Mapping[str, Any], task: str, where: str) -> Rows:
    columns = [*COLUMNS[task], *(["text_pair"] if task == "text-classification" and "text_pair" in inputs else [])]
    ids = inputs.get("input_ids", inputs.get(""))
    if ids is not None:
        return {
            name: _tokens(ids if name == "input_ids" else inputs[name], where)
            for name in TOKENS
            if name == "input_ids" or inputs.get(name) is not None
        }
    missing = next((name for name in columns if name not in inputs), None)
    if missing is not None:
        raise InputError(
            f"{where} has neither 'input_ids' nor '{missing}'",
            f"it has {', '.join(inputs) or 'nothing'}",
            "give what the tokenizer returns, or texts together with tokenizer=",
        )
    return {name: _each(inputs[name], name) for name in columns}


def _each(value: Any, name: str) -> list[Any]:
    """The values of a batch, or the single value of a row: a text, or for `tokens` a list of words."""
    is_row = isinstance(value, str) or (name == "tokens" and all(isinstance(word, str) for word in value))
    return [value] if is_row else list(value)


def _tokens(value: Any, where: str) -> list[np.ndarray]:
    """int64 [tokens] per row, from a tensor or from lists that may differ in length."""
    try:
        rows = value if isinstance(value, torch.Tensor | np.ndarray) else [np.asarray(one) for one in value]
        if len(rows) and rows[0].ndim == 0:
            rows = [np.asarray(rows)]
        made = [np.asarray(row) for row in rows]
        if all(row.ndim == 1 and len(row) and row.dtype.kind in "iub" for row in made):
            return [row.astype(np.int64) for row in made]
        why = "a row is not a list of whole numbers"
    except (TypeError, ValueError, RuntimeError) as error:
        why = str(error)[:200]
    raise InputError(f"{where} has unusable tokens", why, "give [rows, tokens], as tokenizers return them")


def _images(inputs: Mapping[str, Any], module: nn.Module, where: str) -> Rows:
    arrays = [name for name, value in inputs.items() if isinstance(value, torch.Tensor | np.ndarray)]
    named = [name for name in (PIXELS, "") if name in arrays] or [name for name in arrays if name not in LABELS]
    if len(named) != 1:
        kinds = ", ".join(f"{name or 'an item'}: {type(value).__name__}" for name, value in inputs.items())
        raise InputError(f"{where} is not one tensor", kinds or "it is empty", "give tensors, as the model takes them")
    array = _array(inputs[named[0]], where)
    image = any(isinstance(part, nn.Conv2d) for part in module.modules())
    return {PIXELS: [array] if array.ndim == 1 or (array.ndim == 3 and image) else list(array)}


def _sounds(inputs: Mapping[str, Any], module: nn.Module, where: str) -> Rows:
    """What the model's feature extractor returns: samples or spectrograms, and the mask of the samples."""
    own = getattr(module, "main_input_name", SOUNDS[0])
    name = next((one for one in SOUNDS if one in inputs), "")
    if name not in inputs or not isinstance(inputs[name], torch.Tensor | np.ndarray):
        raise InputError(
            f"{where} has no '{own}'",
            f"it has {', '.join(map(repr, inputs)) or 'nothing'}",
            "give what the model's feature extractor returns, as tensors [rows, ...]",
        )
    arrays = {name or own: _array(inputs[name], where)}
    if inputs.get(MASK) is not None:
        arrays[MASK] = _array(inputs[MASK], where)
    spectrogram = own == SOUNDS[1] or any(isinstance(part, nn.Conv2d) for part in module.modules())
    one = arrays[name or own].ndim == (2 if spectrogram else 1)
    return {column: [array] if one else list(array) for column, array in arrays.items()}


def _array(value: torch.Tensor | np.ndarray, where: str) -> np.ndarray:
    """Floating-point numbers as float32, others as int64."""
    tensor = torch.as_tensor(value).detach().cpu()
    if tensor.dtype == torch.uint8 or tensor.ndim == 0 or tensor.is_complex():
        raise InputError(
            f"{where} is not what a model takes",
            f"it is {str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}",
            "give the output of the model's own preprocessing, [rows, ...]",
        )
    return tensor.to(torch.float32 if tensor.is_floating_point() else torch.int64).numpy()


def _stacked(rows: list[np.ndarray], name: str) -> np.ndarray:
    odd = next((index for index, row in enumerate(rows) if row.shape != rows[0].shape), None)
    if odd is not None:
        raise InputError(
            f"the rows of {name} differ in shape",
            f"row 0 is {list(rows[0].shape)}, row {odd} is {list(rows[odd].shape)}",
            "give rows of one shape",
        )
    return np.stack(rows)


def _without_padding(rows: Rows, name: str) -> Rows:
    """Each row up to the last token in its mask; token types are dropped if all are 0."""
    ids = rows["input_ids"]
    masks = rows.get("attention_mask") or [np.ones_like(row) for row in ids]
    rows = {"input_ids": ids, "attention_mask": masks, **rows}
    for number in range(len(ids)):
        lengths = {column: len(values[number]) for column, values in rows.items() if column in TOKENS}
        if len(set(lengths.values())) > 1 or not masks[number].any():
            why = f"tokens by name: {lengths}" if len(set(lengths.values())) > 1 else "its mask has no token"
            raise InputError(f"row {number} of {name} cannot be used", why, "give what the tokenizer returns")
    if not any(row.any() for row in rows.get("token_type_ids", ())):
        rows.pop("token_type_ids", None)
    ends = [int(np.flatnonzero(mask)[-1]) + 1 for mask in masks]
    return {
        column: [row[:end] for row, end in zip(values, ends, strict=True)] if column in TOKENS else values
        for column, values in rows.items()
    }
