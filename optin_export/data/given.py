"""Make `Sources` of a model and rows in memory, as for those that a recipe names."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

from optin_export.data.batches import Processor, TextProcessor, _positions, make_processor
from optin_export.data.in_memory import MASK, PIXELS, SOUNDS, TOKENS
from optin_export.data.loading import Sources, checked_sources
from optin_export.data.readers import Examples
from optin_export.data.text import PROCESSORS
from optin_export.data.truncation import length_warnings
from optin_export.errors import InputError
from optin_export.models import Inputs, LoadedModel, fitted_tokenizer
from optin_export.recipe import Recipe

#: The default of `export.sequence`.
SEQUENCE = 128


class GivenArrays:
    """Encodes rows whose columns are already the model's inputs, [rows, ...] each: images, or sound."""

    def order(self, examples: Examples) -> np.ndarray:
        return np.arange(len(examples))

    def encode(self, examples: Examples, pad_to: int | None = None) -> Inputs:
        arrays = {name: examples.columns[name] for name in (PIXELS, *SOUNDS, MASK) if name in examples.columns}
        return {name: torch.from_numpy(np.ascontiguousarray(array)) for name, array in arrays.items()}

    def targets(self, examples: Examples, inputs: Inputs) -> Sequence[Any] | None:
        return None


class GivenTokens:
    """Encodes rows of tokens, int64 [tokens] each, padded to the longest in a batch; always to `sequence` if `full`.

    pad: the padding token. mask: whether the model reads an attention mask.
    """

    def __init__(self, sequence: int, pad: int, mask: bool = True, full: bool = False) -> None:
        self.sequence, self.pad, self.mask, self.full = sequence, pad, mask, full

    def order(self, examples: Examples) -> np.ndarray:
        return np.argsort([len(ids) for ids in examples.columns["input_ids"]], kind="stable")

    def encode(self, examples: Examples, pad_to: int | None = None) -> Inputs:
        longest = max(len(ids) for ids in examples.columns["input_ids"])
        length = min(self.sequence, pad_to or self.sequence) if pad_to or self.full else longest
        encoded = {}
        for name in TOKENS:
            if name in examples.columns and (self.mask or name != "attention_mask"):
                fill = self.pad if name == "input_ids" else 0
                rows = [np.pad(row, (0, length - len(row)), constant_values=fill) for row in examples.columns[name]]
                encoded[name] = torch.from_numpy(np.stack(rows))
        return encoded

    def targets(self, examples: Examples, inputs: Inputs) -> Sequence[Any] | None:
        return None


def given_sources(
    recipe: Recipe, loaded: LoadedModel, calibration: Examples, evaluation: Examples | None, tokenizer: Any = None
) -> Sources:
    """Sources of a model and rows in memory, checked as those of a recipe are.

    Args:
        recipe: everything except the model and its rows.
        calibration, evaluation: from `given_rows`; the latter with labels.
        tokenizer: a transformers tokenizer, for rows of text; None: the recipe's (`model.tokenizer`).

    Raises InputError for rows that do not fit the model.
    """
    rows = {"calibration": [calibration]} | ({} if evaluation is None else {"evaluation": [evaluation]})
    if evaluation is not None and evaluation.columns.keys() - {"label"} != calibration.columns.keys():
        raise InputError(
            "calibration and evaluation differ in kind",
            f"the one has {', '.join(calibration.columns)}, the other one {', '.join(evaluation.columns)}",
            "give both in the same form",
        )
    processor = _processor(recipe, loaded, calibration, tokenizer)
    if isinstance(processor, GivenTokens):
        for (examples,) in rows.values():
            _check_tokens(examples, processor.sequence, loaded.model.model)
    notes = (*loaded.notes, *length_warnings(processor, rows))
    return checked_sources(Sources(recipe, loaded, processor, calibration, evaluation, notes=notes))


def usual_sequence(calibration: Examples, module: nn.Module) -> int:
    """The default sequence length: the longest row of tokens; for texts the recipe's default, limited by the model's
    positions."""
    ids = calibration.columns.get("input_ids")
    return max(map(len, ids)) if ids is not None else min(SEQUENCE, _positions(module) or SEQUENCE)


def _processor(recipe: Recipe, loaded: LoadedModel, calibration: Examples, tokenizer: Any) -> Processor:
    if {PIXELS, *SOUNDS} & calibration.columns.keys():
        return GivenArrays()
    config, task = getattr(loaded.model.model, "config", None), recipe.model.task
    if "input_ids" in calibration.columns:
        mask = getattr(loaded.model, "reads_mask", True)
        pad = getattr(config, "pad_token_id", None)
        return GivenTokens(recipe.export.sequence, pad if isinstance(pad, int) else 0, mask, recipe.tokens.merges)
    if tokenizer is None and recipe.model.tokenizer is None:
        raise InputError("the data is text", "nothing turns it into tokens", "set tokenizer= to the model's own")
    if tokenizer is not None:
        tokenizer = fitted_tokenizer(copy.deepcopy(tokenizer), "tokenizer=", task)
    pairs = "text_pair" in calibration.columns or task == "question-answering"
    return make_processor(loaded, recipe, pairs, PROCESSORS.get(task, TextProcessor), tokenizer)


def _check_tokens(examples: Examples, sequence: int, model: nn.Module) -> None:
    longest = max(map(len, examples.columns["input_ids"]))
    limit, vocabulary = _positions(model), getattr(getattr(model, "config", None), "vocab_size", None)
    highest = max(int(row.max()) for row in examples.columns["input_ids"])
    if vocabulary is not None and highest >= vocabulary:
        raise InputError(
            "the tokens do not fit the model",
            f"one is {highest}, the model has {vocabulary}",
            "use the tokenizer the model was trained with",
        )
    if longest > sequence or (limit is not None and sequence > limit):
        why = f"sequence is {sequence}, the longest row has {longest} tokens"
        why += "" if limit is None else f", the model {limit} positions"
        raise InputError("the rows do not fit the sequence length", why, "cut the rows, or set sequence= to fit")
