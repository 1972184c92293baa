"""Metrics of retrieval: recall@k and nDCG@k, over the documents of all rows.

A row is a query, its document, and how relevant that is. The documents of all rows are searched for the document of a
query; a row whose label is 0 only adds a document.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

#: Number of a row -> the similarities of its query to the documents of all rows, [rows].
Ranked = Callable[[int], np.ndarray]


def ranks(similar: Ranked, labels: Sequence[Any] | np.ndarray) -> np.ndarray:
    """[rows]: the rank of every query's own document, from 1; of equally similar ones the middle; NaN: no query."""
    found = np.full(len(labels), np.nan)
    for row in np.flatnonzero(np.asarray(labels, np.float64) > 0):
        values = similar(int(row))
        own = values[row]
        # Embeddings that are all equal must not find everything.
        found[row] = 1 + (values > own).sum() + ((values == own).sum() - 1) / 2
    return found


def recall(k: int) -> Callable[[np.ndarray], np.ndarray]:
    """ranks [rows] -> [rows, 2]: whether the document is among the first k, and whether the row is a query."""
    return lambda found: np.stack([found <= k, np.isfinite(found)], 1).astype(np.float64)


def gain(k: int) -> Callable[[np.ndarray], np.ndarray]:
    """ranks [rows] -> [rows, 2]: nDCG@k of the query with its one relevant document, and whether the row is a query."""

    def statistic(found: np.ndarray) -> np.ndarray:
        counted = np.isfinite(found)
        ranks = np.where(counted, found, 1.0)
        return np.stack([np.where(counted & (ranks <= k), 1 / np.log2(1 + ranks), 0.0), counted], 1)

    return statistic
