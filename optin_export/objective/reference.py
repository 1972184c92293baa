"""The unpruned model on the calibration rows, run once: what every loss, score and repair compares with."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, Literal

import numpy as np
import torch

from optin_export.data import Batch
from optin_export.models import TaskModel
from optin_export.objective.observation import Observation, observe
from optin_export.units import Structure, measured
from optin_export.workdir.disk_offload import OffloadedTensors

#: Token rows per sample that loss curves, sensitivities and repairs compare.
ROWS = 24
#: "hidden": all, to replay block outputs; "rows": without block outputs; "output": the output only, on the CPU.
Keep = Literal["hidden", "rows", "output"]


class Reference(Sequence[Observation]):
    """The unpruned model on batches of calibration rows: each is run once, when it is first asked for.

    It has to be as it is then: call `observe` before anything changes what the model computes.

    What is kept of the passes takes a limited amount of memory, and disk beyond it.

    Args:
        model, structure: the unpruned model; a structure that was not measured is measured on the first batch.
        rows: token rows compared per sample and block.
        draw: makes the random numbers that choose these rows: one generator for all batches in turn, or batch number ->
            a generator of its own, so that a worker observes only its own batches.
        keep: what of an observation.
    """

    def __init__(
        self,
        model: TaskModel,
        structure: Structure,
        batches: Sequence[Batch],
        rows: int = ROWS,
        draw: torch.Generator | Callable[[int], torch.Generator] | None = None,
        keep: Keep = "hidden",
    ) -> None:
        self.model, self.batches, self.rows, self.keep = model, batches, rows, keep
        self.declared = structure
        self.draw = torch.Generator().manual_seed(0) if draw is None else draw
        self.known = OffloadedTensors("the unpruned model's pass", "lower prune.score_samples or prune.curve_samples")
        self.last: tuple[int, Observation] | None = None

    @property
    def structure(self) -> Structure:
        return measured(self.model, self.declared, self.batches[0].inputs) if self.batches else self.declared

    @property
    def samples(self) -> int:
        """In all batches; nothing is run for it."""
        return sum(len(next(iter(batch.inputs.values()))) for batch in self.batches)

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, number: Any) -> Any:
        if isinstance(number, slice):
            return [self[index] for index in range(*number.indices(len(self)))]
        if not 0 <= number < len(self):
            raise IndexError(number)
        if self.last is None or self.last[0] != number:
            self.last = None  # before the next one is loaded: two are never held
            self.observe(number)
            self.last = number, Observation(**self.known[number])
        return self.last[1]

    def observe(self, number: int | None = None) -> None:
        """Run batch `number`, or all batches, if that was not done before."""
        last = len(self) - 1 if number is None else number
        # One generator: its numbers depend on all batches before.
        first = 0 if number is None or isinstance(self.draw, torch.Generator) else number
        for index in range(first, last + 1):
            if index not in self.known:
                self.declared = self.structure
                generator = self.draw if isinstance(self.draw, torch.Generator) else self.draw(index)
                found = observe(self.model, self.declared, self.batches[index], self.rows, generator)
                self.known[index] = vars(_reduced(found, self.keep))

    def generator(self) -> torch.Generator:
        """A copy of the one generator as it was after the last batch: what follows draws on from there."""
        assert isinstance(self.draw, torch.Generator)
        return self.draw.clone_state()

    def close(self) -> None:
        """Forget what was observed, and delete its files."""
        self.last = None
        self.known.close()


def derived(generator: torch.Generator, *key: int) -> torch.Generator:
    """A generator for one purpose, from the seed of `generator` and numbers that name the purpose."""
    words = np.random.SeedSequence([generator.initial_seed(), *key]).generate_state(2, np.uint32)
    return torch.Generator().manual_seed(int(words[0]) << 32 | int(words[1]))


def samples_of(references: Sequence[Observation]) -> int:
    """Samples in all batches; of a `Reference` without running the model."""
    return references.samples if isinstance(references, Reference) else sum(map(len, references))


def _reduced(found: Observation, keep: Keep) -> Observation:
    if keep == "hidden":
        return found
    if keep == "rows":
        return dataclasses.replace(found, hidden={})
    picked = None if found.picked is None else found.picked.cpu()
    return dataclasses.replace(
        found, chosen={}, rows={}, hidden={}, picked=picked, output=found.output.cpu(), weights=found.weights.cpu()
    )
