"""Training rows: epochs of batches in a seeded order, and some held-out rows."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np

from optin_export.data.batches import Batch, Processor
from optin_export.data.readers import Examples
from optin_export.errors import InputError

#: One in this many rows is held out, up to a maximum that is quick to evaluate.
HOLD_OUT, MOST_HELD_OUT = 5, 256


class Training:
    """Batches of `size` rows. Each iteration is one epoch in a new order; the seed determines all of them.

    Batches have `targets` if labels are given.
    """

    def __init__(
        self, processor: Processor, examples: Examples, labels: np.ndarray | None, size: int, seed: int
    ) -> None:
        self.processor, self.examples, self.labels, self.size = processor, examples, labels, size
        self.generator = np.random.default_rng(seed)

    def __len__(self) -> int:
        return -(-len(self.examples) // self.size)

    def __iter__(self) -> Iterator[Batch]:
        order = self.generator.permutation(len(self.examples))
        for start in range(0, len(order), self.size):
            yield self.batch(order[start : start + self.size])

    def in_order(self) -> tuple[Batch, ...]:
        rows = np.arange(len(self.examples))
        return tuple(self.batch(rows[at : at + self.size]) for at in range(0, len(rows), self.size))

    def batch(self, rows: np.ndarray) -> Batch:
        encoded = Batch(self.processor.encode(self.examples.take(rows)), rows)
        return encoded if self.labels is None else replace(encoded, targets=self.labels[rows])


def split(
    processor: Processor,
    examples: Examples,
    labels: np.ndarray | None,
    size: int,
    seed: int,
    spare: Examples | None = None,
) -> tuple[Training, tuple[Batch, ...]]:
    """Training rows, and batches of held-out rows: `spare` rows, which have not been used yet, or else some of
    `examples`. Raises InputError for fewer than two rows."""
    if spare is not None and len(spare):
        kept_out = Training(processor, spare, None, size, seed)
        return Training(processor, examples, labels, size, seed), kept_out.in_order()
    if len(examples) < 2:
        raise InputError("cannot fine-tune on one row", "one row is for training, one is held out", "give more data")
    order = np.random.default_rng(seed).permutation(len(examples))
    held = min(max(1, len(order) // HOLD_OUT), MOST_HELD_OUT)
    parts = [np.sort(order[held:]), np.sort(order[:held])]
    chosen, kept_out = (
        Training(processor, examples.take(rows), None if labels is None else labels[rows], size, seed) for rows in parts
    )
    return chosen, kept_out.in_order()
