"""The unpruned model's outputs on the calibration rows, with which every loss, score and repair compares."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, Literal

import numpy as np
import torch

from optin_export.data import Batch
from optin_export.models import TaskModel, gathered
from optin_export.objective.observation import Observation, observe
from optin_export.units import Structure, measured
from optin_export.workdir.disk_offload import OffloadedTensors

#: Token rows per sample that are compared in loss curves, sensitivities and repairs.
ROWS = 24
#: "hidden": all, to replay block outputs; "rows": without block outputs; "output": the output only, on the work device.
Keep = Literal["hidden", "rows", "output"]


class Reference(Sequence[Observation]):
    """The unpruned model on batches of calibration rows; each batch is run once, when it is first requested.

    The model must still be unchanged then: call `observe` before anything changes what it computes.

    Observations are kept in a limited amount of memory, and on disk beyond it.

    Args:
        model, structure: the unpruned model; a structure that was not measured is measured on the first batch.
        rows: token rows compared per sample and block.
        draw: chooses these rows at random: one generator for all batches in turn, or a function from batch number to a
            separate generator, so that a worker observes only its own batches.
        keep: the part of an observation to keep.
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
        """Number of samples in all batches; does not run the model."""
        return sum(len(next(iter(batch.inputs.values()))) for batch in self.batches)

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, number: Any) -> Any:
        if isinstance(number, slice):
            return [self[index] for index in range(*number.indices(len(self)))]
        if not 0 <= number < len(self):
            raise IndexError(number)
        if self.last is None or self.last[0] != number:
            self.last = None  # before the next one is loaded, so that two are never in memory
            self.observe(number)
            self.last = number, Observation(**self.known[number])
        return self.last[1]

    def observe(self, number: int | None = None) -> None:
        """Run batch `number`, or all batches, unless already done."""
        last = len(self) - 1 if number is None else number
        # One generator: its numbers depend on all earlier batches.
        first = 0 if number is None or isinstance(self.draw, torch.Generator) else number
        for index in range(first, last + 1):
            if index not in self.known:
                self.declared = self.structure
                generator = self.draw if isinstance(self.draw, torch.Generator) else self.draw(index)
                found = observe(self.model, self.declared, self.batches[index], self.rows, generator)
                self.known[index] = vars(_reduced(found, self.keep))

    def generator(self) -> torch.Generator:
        """A copy of the single generator in its state after the last batch, from which later steps continue."""
        assert isinstance(self.draw, torch.Generator)
        return self.draw.clone_state()

    def close(self) -> None:
        """Discard all observations and delete their files."""
        self.last = None
        self.known.close()


def derived(generator: torch.Generator, *key: int) -> torch.Generator:
    """A generator for one purpose, from the seed of `generator` and numbers that identify the purpose."""
    words = np.random.SeedSequence([generator.initial_seed(), *key]).generate_state(2, np.uint32)
    return torch.Generator().manual_seed(int(words[0]) << 32 | int(words[1]))


def samples_of(references: Sequence[Observation]) -> int:
    """Number of samples in all batches; does not run the model of a `Reference`."""
    return references.samples if isinstance(references, Reference) else sum(map(len, references))


def _reduced(found: Observation, keep: Keep) -> Observation:
    if keep == "hidden":
        return found
    if keep == "rows":
        return dataclasses.replace(found, hidden={})
    picked = None if found.picked is None else gathered(found.picked)
    return dataclasses.replace(
        found,
        chosen={},
        rows={},
        hidden={},
        picked=picked,
        output=gathered(found.output),
        weights=gathered(found.weights),
    )
