"""Scoring in shards: work items that depend only on their own description, and can be executed anywhere.

A shard is a batch with an operation: units masked exactly, probes of the sketch, sizes of contributions. Its random
numbers come from the seed and its own numbers, not from earlier draws, and its result is a float64 sum over its
samples. The shards do not depend on the number of workers, and their sums are added in the order of the shards, not of
completion. So the scores do not depend on the number of workers.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np

#: The result of a shard: float64 arrays by name, sums over the samples of its batch.
Partial = dict[str, np.ndarray]


@dataclass(frozen=True)
class Shard:
    """One piece of work on batch number `batch`.

    kind: "exact": losses of masking `units` of `group`; "few": the same on some rows of the batch; "pilot": `count`
    probes of the two terms separately, starting at number `start`; "output": the same without the trajectory; "probes":
    probes of the combined loss; "sizes": sizes of contributions.
    """

    kind: Literal["exact", "few", "pilot", "output", "probes", "sizes"]
    batch: int
    group: str = ""
    units: tuple[int, ...] = ()
    start: int = 0
    count: int = 0
    weight: float = 0.0

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


#: Shards -> the result of each, in their order.
Map = Callable[[Sequence[Shard]], Iterable[Partial]]
Work = Callable[[Shard], Partial]
#: A context that provides a `Map`, which executes the work here or on workers.
Spread = Callable[[Work], AbstractContextManager[Map]]


@contextlib.contextmanager
def in_process(work: Work) -> Iterator[Map]:
    """Execute every shard in this process, one after another."""
    yield lambda shards: map(work, shards)
