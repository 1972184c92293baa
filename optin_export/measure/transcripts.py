"""Word error rate: how many words of a transcript must be changed, added or removed to give the right text."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from optin_export.errors import InputError

#: A word: letters, digits and the apostrophes between them. Case and punctuation are not compared.
_WORD = re.compile(r"\w+(?:['’]\w+)*")


def words(text: str) -> list[str]:
    """The words of a text in lower case, without punctuation."""
    return [word.replace("’", "'") for word in _WORD.findall(text.lower())]


def edits(text: str, heard: str) -> tuple[int, int]:
    """(least number of words to replace, add or remove in `heard` to get `text`, number of words of `text`)."""
    right, found = words(text), words(heard)
    row = list(range(len(found) + 1))
    for count, word in enumerate(right, 1):
        before, row = row, [count]
        for at, other in enumerate(found):
            row.append(min(before[at + 1] + 1, row[at] + 1, before[at] + (word != other)))
    return row[-1], len(right)


def word_errors(outputs: np.ndarray, labels: Sequence[Any], inputs: Mapping[str, np.ndarray]) -> np.ndarray:
    """[rows, 2]: edits and words of the right text. outputs: [rows, frames, features]; labels: `Transcript`s."""
    rows = zip(outputs, labels, strict=True)
    return np.array([edits(label.text, label.heard(output)) for output, label in rows], np.float64)


def error_rate(statistics: np.ndarray) -> float:
    """100 times the edits per word of the right texts."""
    wrong, counted = statistics.sum(0)
    if counted == 0:
        raise InputError("the metric wer is not defined here", "no text has a word", "check columns.label")
    return 100.0 * float(wrong / counted)
