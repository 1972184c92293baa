"""Scoring in shards: pieces of work that depend on nothing but their own description, and can be done anywhere.

A shard is a batch and what is done with it: units masked exactly, probes of the sketch, sizes of contributions. Its
random numbers come from the seed and its own numbers, not from what was drawn before, and what it gives is a float64
sum over its samples. Shards are cut in the same way however many workers there are, and their sums are added up in the
order of the shards, whoever was faster: the scores do not depend on the number of workers.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np

#: What a shard gives: float64 arrays by name, sums over the samples of its batch.
Partial = dict[str, np.ndarray]


@dataclass(frozen=True)
class Shard:
    """One piece of work on batch number `batch`.

    kind: "exact": losses of masking `units` of `group`; "pilot": `count` probes of both terms apart from number
    `start` on; "output": the same without the trajectory; "probes": of the combined loss; "sizes": contributions.
    """

    kind: Literal["exact", "pilot", "output", "probes", "sizes"]
    batch: int
    group: str = ""
    units: tuple[int, ...] = ()
    start: int = 0
    count: int = 0
    weight: float = 0.0

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


#: Shards -> what each gives, in their order.
Map = Callable[[Sequence[Shard]], Iterable[Partial]]
Work = Callable[[Shard], Partial]
#: Offers, for as long as it is open, a `Map` that has the work done, here or elsewhere.
Spread = Callable[[Work], AbstractContextManager[Map]]


@contextlib.contextmanager
def in_process(work: Work) -> Iterator[Map]:
    """Every shard here, one after another."""
    yield lambda shards: map(work, shards)
