"""Which held-out rows choose and which report, and which of them a fine-tuned model has seen in training.

Defaults are chosen on one half of every case's held-out rows, `choose`; results are told of the other, `report`. The
half of a row follows from what it holds, not from where it stands; equal rows, pairs of sentences that share one, and
phrases of one sentence are in the same half.
"""

from __future__ import annotations

import hashlib
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from optin_export.measure import METRICS, lost

CHOOSE, REPORT = "choose", "report"
#: Parts of cases whose model was fine-tuned: rows that are no part of a training text, and those of the report half.
CLEAN, CLEAN_REPORT = "clean", "clean_report"
#: Shorter phrases occur in sentences that have nothing to do with one another ("the film").
LEAST_WORDS = 3

Columns = Mapping[str, Any]


def normal(text: str) -> str:
    """The words of a text: without case, punctuation and the number of spaces."""
    return " ".join(re.findall(r"[^\W_]+", text.casefold()))


def parts_of(texts: Sequence[str], known: Iterable[str]) -> np.ndarray:
    """[texts]: whether each is a part of a known text, word for word, or all of it; so is a text without words."""
    whole = "\n".join(f" {normal(text)} " for text in known)
    return np.array([not normal(text) or f" {normal(text)} " in whole for text in texts], dtype=bool)


def holding(texts: Sequence[str], known: Iterable[str]) -> np.ndarray:
    """[texts]: the other way round, whether each holds a known text of LEAST_WORDS words or more."""
    short = {normal(text) for text in known}

    def holds(words: list[str]) -> bool:
        ends = range(len(words) + 1)
        return any(" ".join(words[first:end]) in short for first in ends for end in ends if end - first >= LEAST_WORDS)

    return np.array([holds(normal(text).split()) for text in texts], dtype=bool)


def groups(columns: Columns, known: Sequence[str] = ()) -> list[str]:
    """The group of each row, named by what it holds; rows of a group stay together.

    Args:
        columns: `text` (and `text_pair`) or `image` of the rows, as in `sources.Examples`.
        known: texts that phrases may come from; with them, phrases of one sentence are a group.
    """
    if "text" not in columns:
        return [_digest(image) for image in columns["image"]]
    sides = [columns[name] for name in ("text", "text_pair") if name in columns]
    rows = [[normal(text) or text.strip() for text in row] for row in zip(*sides, strict=True)]
    links = [row for row in rows if len(row) > 1]
    if known:
        owners = _sentences([*(text for row in rows for text in row), *(normal(text) for text in known)])
        for text in sorted({text for row in rows for text in row}):
            sentences = owners.get(text, [])
            if len(sentences) == 1 or len(text.split()) >= LEAST_WORDS:
                links.append([text, *sentences])
    names = _joined(links)
    return [names.get(row[0], row[0]) for row in rows]


def half_of(group: str) -> str:
    """CHOOSE or REPORT, by the group's name alone."""
    return CHOOSE if hashlib.sha256(group.encode()).digest()[0] % 2 == 0 else REPORT


def parts(columns: Columns, trained_on: Sequence[str] = ()) -> dict[str, np.ndarray]:
    """{name of a part: its rows, ascending}: both halves and, for a model trained on those texts, the clean rows."""
    halves = np.array([half_of(group) for group in groups(columns, trained_on)])
    found = {half: np.flatnonzero(halves == half) for half in (CHOOSE, REPORT)}
    if trained_on:
        clean = ~parts_of(columns["text"], trained_on)
        found |= {CLEAN: np.flatnonzero(clean), CLEAN_REPORT: np.flatnonzero(clean & (halves == REPORT))}
    return found


def facts(columns: Columns, trained_on: Sequence[str] = ()) -> dict[str, Any]:
    """What a result file says of the held-out rows.

    training_texts: how many are parts of texts that the model was fine-tuned on, and how many of the rest hold one.
    """
    found, rows = parts(columns, trained_on), len(next(iter(columns.values())))
    result: dict[str, Any] = {"held_out_rows": rows, "parts": {name: len(one) for name, one in found.items()}}
    if trained_on:
        clean = [columns["text"][row] for row in found[CLEAN]]
        inside, holds = rows - len(clean), int(holding(clean, trained_on).sum())
        result["training_texts"] = {"parts_of_training_texts": inside, "holding_one": holds}
    return result


def judged(base: np.ndarray, pruned: np.ndarray, metric: str, rows: np.ndarray) -> dict[str, Any]:
    """What a study says of a model: points of both and points lost on the rows that may choose.

    base, pruned: the metric's statistics of all held-out rows. rows: those of CHOOSE.
    """
    value = METRICS[metric].value
    before, after = value(base[rows]), value(pruned[rows])
    drop = lost(metric, before, after)
    return {"half": CHOOSE, "base": round(before, 3), "accuracy": round(after, 3), "drop": round(drop, 3)}


def _digest(image: Any) -> str:
    content = image.read_bytes() if isinstance(image, Path) else np.ascontiguousarray(image).tobytes()
    return hashlib.sha256(content).hexdigest()


def _sentences(texts: Iterable[str]) -> dict[str, list[str]]:
    """{text: the texts it is a part of that are themselves a part of none}: the whole sentences, itself included."""
    by_word: dict[str, list[str]] = defaultdict(list)
    found: dict[str, list[str]] = {}
    for text in sorted({text for text in texts if text}, key=lambda text: (-len(text), text)):
        words = text.split()
        rarest = min(words, key=lambda word: len(by_word.get(word, ())))
        owners = [whole for whole in by_word.get(rarest, ()) if f" {text} " in f" {whole} "]
        if not owners:
            for word in set(words):
                by_word[word].append(text)
        found[text] = owners or [text]
    return found


def _joined(links: Iterable[Sequence[str]]) -> dict[str, str]:
    """{name: the smallest name that links connect it with}."""
    parent: dict[str, str] = {}

    def root(name: str) -> str:
        parent.setdefault(name, name)
        while parent[name] != name:
            parent[name] = parent[parent[name]]
            name = parent[name]
        return name

    for first, *others in links:
        for other in others:
            low, high = sorted((root(first), root(other)))
            parent[high] = low
        root(first)
    return {name: root(name) for name in list(parent)}
