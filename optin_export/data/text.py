"""Tasks with labels per token: encode rows, and make the targets of each encoded row.

Targets are as long as their row: a class per token, or IGNORED; for question answering, an `Answer`.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch

from optin_export.data.batches import TextProcessor
from optin_export.data.readers import Examples
from optin_export.errors import InputError
from optin_export.models.tasks import IGNORED, Inputs

#: Share of a text's tokens that are replaced by the mask token, as BERT was trained and evaluated.
MASKED = 0.15


@dataclass(frozen=True)
class Answer:
    """The right answers to one question, with the data for extracting an answer from the scores of tokens.

    offsets: [tokens, 2], where a token's characters begin and end in `context`; -1 for tokens outside it.
    """

    answers: tuple[str, ...]
    context: str
    offsets: np.ndarray


class WordProcessor(TextProcessor):
    """token-classification: `tokens`, a list of words per row. The first token of a word has its label."""

    columns = ("tokens",)
    options: ClassVar[dict[str, Any]] = {"truncation": True, "is_split_into_words": True}

    def targets(self, examples: Examples, inputs: Inputs) -> Sequence[Any]:
        encoded = self._tokenise(examples)
        found = []
        for row, labels in enumerate(examples.columns["label"]):
            words = encoded.word_ids(row)
            begins = [word is not None and (at == 0 or words[at - 1] != word) for at, word in enumerate(words)]
            kept = [labels[word] if begin else IGNORED for word, begin in zip(words, begins, strict=True)]
            found.append(np.array(kept, np.int64))
        return found


class QuestionProcessor(TextProcessor):
    """question-answering: `question` and `context`; the end of the context is cut if both are too long."""

    columns = ("question", "context")
    options: ClassVar[dict[str, Any]] = {"truncation": "only_second"}

    def targets(self, examples: Examples, inputs: Inputs) -> Sequence[Any]:
        encoded = self._tokenise(examples, return_offsets_mapping=True)
        found = []
        for row, offsets in enumerate(encoded["offset_mapping"]):
            inside = np.array([part == 1 for part in encoded.sequence_ids(row)])
            places = np.where(inside[:, None], np.array(offsets), -1)
            answers = tuple(examples.columns["label"][row])
            found.append(Answer(answers, examples.columns["context"][row], places))
        return found


class MaskedProcessor(TextProcessor):
    """fill-mask: a seeded share of each text's tokens is masked; the choice depends only on that text."""

    def encode(self, examples: Examples, pad_to: int | None = None) -> Inputs:
        inputs = super().encode(examples, pad_to)
        ids = inputs["input_ids"]
        hidden = np.stack([self._hidden(row[mask == 1], len(row)) for row, mask in _rows(inputs)])
        return {**inputs, "input_ids": ids.masked_fill(torch.from_numpy(hidden), self.tokenizer.mask_token_id)}

    def targets(self, examples: Examples, inputs: Inputs) -> Sequence[Any]:
        whole = super().encode(examples)
        return [np.where(self._hidden(row[mask == 1], len(row)), row, IGNORED) for row, mask in _rows(whole)]

    def _hidden(self, ids: np.ndarray, length: int) -> np.ndarray:
        """bool [length]: which tokens of one text are masked; never the tokenizer's own marks."""
        hidden = np.zeros(length, bool)
        words = np.flatnonzero(~np.isin(ids, self.tokenizer.all_special_ids))
        if len(words):
            generator = np.random.default_rng([self.seed, zlib.crc32(np.ascontiguousarray(ids).tobytes())])
            hidden[generator.permutation(words)[: max(1, round(MASKED * len(words)))]] = True
        return hidden


class CausalProcessor(TextProcessor):
    """text-generation: the target of every token is the next one."""

    def targets(self, examples: Examples, inputs: Inputs) -> Sequence[Any]:
        return [np.append(row[mask == 1][1:], IGNORED) for row, mask in _rows(inputs)]


#: Tasks with their own encoding of rows.
PROCESSORS: Mapping[str, type[TextProcessor]] = {
    "token-classification": WordProcessor,
    "question-answering": QuestionProcessor,
    "fill-mask": MaskedProcessor,
    "text-generation": CausalProcessor,
}


def _rows(inputs: Inputs) -> list[tuple[np.ndarray, np.ndarray]]:
    return list(zip(inputs["input_ids"].numpy(), inputs["attention_mask"].numpy(), strict=True))


def answers(examples: Examples) -> list[tuple[str, ...]]:
    """The right answers to each question: a text, a list of texts, or SQuAD's {"text": [...]}.

    Raises InputError for a question without one.
    """
    found = []
    for row, label in enumerate(examples.columns["label"]):
        given = label.get("text") if isinstance(label, dict) else label
        texts: Any = [given] if isinstance(given, str) else given
        usable = isinstance(texts, list | tuple) and len(texts) > 0 and all(isinstance(text, str) for text in texts)
        if not usable:
            raise InputError(
                f"{examples.where(row)} has no usable answer",
                f"its label is {label!r:.80}",
                "give a text, a list of texts or SQuAD's {text: [...]}; remove questions without an answer",
            )
        found.append(tuple(texts))
    return found
