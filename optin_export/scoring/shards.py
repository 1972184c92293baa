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
import torch

from optin_export.data import Batch
from optin_export.models import TaskModel
from optin_export.scoring.losses import Reference, observe
from optin_export.units import Structure
from optin_export.workdir.disk_offload import OffloadedTensors

#: Token rows are shared evenly among the samples of a batch of this size.
ROWS_SHARED_BY = 32
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


def derived(generator: torch.Generator, *key: int) -> torch.Generator:
    """A generator for one purpose, from the seed of `generator` and numbers that name the purpose."""
    words = np.random.SeedSequence([generator.initial_seed(), *key]).generate_state(2, np.uint32)
    return torch.Generator().manual_seed(int(words[0]) << 32 | int(words[1]))


class References(Sequence[Reference]):
    """The unpruned model on every scoring batch, run when it is first asked for: a worker observes its own batches.

    rows: token rows a batch of ROWS_SHARED_BY and block, the same number per sample.
    """

    def __init__(
        self, model: TaskModel, structure: Structure, batches: Sequence[Batch], rows: int, generator: torch.Generator
    ) -> None:
        self.model, self.structure, self.batches = model, structure, batches
        self.rows, self.generator = max(1, rows // ROWS_SHARED_BY), generator
        self.known = OffloadedTensors("the scores", "lower prune.score_samples")
        self.last: tuple[int, Reference] | None = None

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, number: Any) -> Any:
        if isinstance(number, slice):
            return [self[index] for index in range(*number.indices(len(self)))]
        if not 0 <= number < len(self):
            raise IndexError(number)
        if self.last is None or self.last[0] != number:
            self.last = None  # before the next one is loaded: two are never held
            if number not in self.known:
                drawn = derived(self.generator, 0, number)
                self.known[number] = vars(observe(self.model, self.structure, self.batches[number], self.rows, drawn))
            self.last = number, Reference(**self.known[number])
        return self.last[1]

    @property
    def samples(self) -> int:
        return sum(len(next(iter(batch.inputs.values()))) for batch in self.batches)


def samples_of(references: Sequence[Reference]) -> int:
    """Samples in all batches; of `References` without running the model."""
    return references.samples if isinstance(references, References) else sum(map(len, references))
