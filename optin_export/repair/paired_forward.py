"""Run two models block by block over the calibration batches, and observe each layer while it runs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch

from optin_export.data import Batch
from optin_export.models import TaskModel, gathered
from optin_export.pruning.token_merging import MergedTokens, flow_of
from optin_export.units import (
    Calls,
    Point,
    Structure,
    capture,
    captured,
    map_tensors,
    measured,
    placeholder,
    replayed,
    tensor_of,
    tensors_in,
)
from optin_export.workdir.disk_offload import OffloadedTensors

#: Batch number, points, module at which the pass may stop -> the values at the points.
See = Callable[[int, Sequence[Point], str], dict[Point, Any]]


class Stream:
    """One model run block by block: outputs of finished blocks that later blocks read are kept and replayed.

    If that is not possible (see `Walk.whole`), every pass begins with the first layer. A structure that was not
    measured is measured on the first batch.

    merged: for a model that merges tokens, per batch the index of the merged token for each token of the unmerged
    stream, [batch, tokens], and their sizes, at the module where the last pass over that batch stopped.
    """

    def __init__(self, model: TaskModel, structure: Structure, batches: Sequence[Batch]) -> None:
        structure = measured(model, structure, batches[0].inputs) if batches else structure
        self.model, self.structure, self.batches = model, structure, batches
        self.walk = structure.walk
        self.placeholders: list[dict[str, Any]] = [{} for _ in batches]
        self.store = _store()
        self.lasting: dict[str, OffloadedTensors] = {}
        self.walked: list[str] = []
        self.copies = False
        self.late: set[str] = set()
        self.flow = flow_of(model)
        if self.flow is not None:
            self.flow.trace = True
        self.merged_before: dict[int, MergedTokens] = {}
        self.merged: dict[int, MergedTokens] = {}

    @property
    def kept(self) -> bool:
        """Whether outputs of finished blocks are kept, and passes compute only what follows them."""
        return self.walk is None or self.walk.whole is None

    def see(self, index: int, points: Sequence[Point], until: str) -> dict[Point, Any]:
        """Run batch `index` up to the module `until`, computing only what follows the finished blocks.

        Returns the values at the points that were reached: a value, or `Calls` for a module that runs several times.
        """
        known = dict(self.placeholders[index])
        known |= {path: store[index] for path, store in self.lasting.items()}
        if known:
            known[self.walked[-1]] = self.store[index]
        if self.flow is not None:
            self.flow.restore(self.merged_before.get(index))
        with torch.no_grad(), replayed(self.model, known, self.structure.rewritten):
            values, written_over = self._pass(index, points, until)
            if written_over and not self.copies:
                self.copies = True  # from now on, because this model overwrites observed values
                if self.flow is not None:
                    self.flow.restore(self.merged_before.get(index))
                values, _ = self._pass(index, points, until)
        return {point: seen[0] if len(seen) == 1 else Calls(seen) for point, seen in values.items()}

    def _pass(self, index: int, points: Sequence[Point], until: str) -> tuple[dict[Point, list[Any]], bool]:
        """The observed values, call by call, and whether the model has overwritten any of them since."""
        calls, keep = {} if self.walk is None else self.walk.calls, _Copies() if self.copies else _Versions()
        stop: str | None = None
        # Modules that run several times are observed at each call, which is complete only at the end of the block.
        often = any(calls.get(path, 1) > 1 for path in (until, *(path for path, _ in points)))
        if self.kept:
            until = stop = self._end_of(until) if often else until
        elif not often and until not in self.late:
            stop = until
        with self._flow_at(index, until), captured(self.model, points, keep, stop, calls.get(until, 1)) as values:
            self.model(**self.batches[index].inputs)
        if stop is not None and not self.kept and any(point not in values for point in points):
            self.late.add(until)  # something is observed behind it, since these blocks do not run one after the other
            return self._pass(index, points, until)
        return values, keep.changed

    def _end_of(self, until: str) -> str:
        """The block in which a module runs; the module itself if it runs in none of the remaining blocks."""
        blocks = [self.structure.blocks[index] for index in self.structure.order]
        return next((path for path in blocks if until == path or until.startswith(f"{path}.")), until)

    def _flow_at(self, index: int, until: str) -> AbstractContextManager[None]:
        """Remember which tokens are merged when the module `until` has run."""
        flow = self.flow

        def remember(path: str, args: Any, output: Any) -> None:
            assert flow is not None
            self.merged[index] = flow.state()

        return capture(self.model, outputs={} if flow is None else {until: remember})

    def advance(self, block: int, see: See | None = None) -> None:
        """Finish `block`, the next one in the order of the structure: keep its output for every batch.

        see: where the outputs come from; default: passes of the model.
        """
        see = see or self.see
        walk, path = self.walk, self.structure.blocks[block]
        if not self.kept:
            return
        position = len(self.walked) + 1
        lasting = walk is not None and walk.last_reader(path) > position
        found = _store() if lasting else None
        for index in range(len(self.batches)):
            output = see(index, [(path, "output")], path)[(path, "output")]
            assert walk is not None
            # Outputs that later blocks than the next one read are kept until then.
            if found is not None:
                found[index] = walk.kept(path, output, position + 1)
            self.placeholders[index][path] = map_tensors(output, lambda _, tensor: placeholder(tensor))
            self.store[index] = walk.kept(path, output, position)
            if self.flow is not None:
                self.merged_before[index] = self.merged[index]
        self.walked.append(path)
        if found is not None:
            self.lasting[path] = found
        for done in [one for one in self.lasting if walk is not None and walk.last_reader(one) < position]:
            self.lasting.pop(done).close()

    def like(self, index: int, value: Any) -> Any:
        """The unmerged model's value where the last pass stopped, averaged as this model merges its tokens."""
        merged = self.merged.get(index)
        if isinstance(value, Calls):
            return Calls(self.like(index, one) for one in value)
        tensor = gathered(tensor_of(value))
        return tensor if merged is None or tensor.dim() != 3 else merged.means(tensor)

    def weights_like(self, index: int, weights: torch.Tensor | None) -> torch.Tensor | None:
        """[rows]: the unmerged model's row weights; a merged token has the sum over all tokens that it represents."""
        merged = self.merged.get(index)
        if weights is None or merged is None or len(weights) != merged.place.numel():
            return weights
        return merged.sums(weights.view(*merged.place.shape, 1)).flatten()

    def close(self) -> None:
        if self.flow is not None:
            self.flow.trace = False
        for store in (self.store, *self.lasting.values()):
            store.close()


def _store() -> OffloadedTensors:
    return OffloadedTensors("the repair", "use fewer data.calibration.samples")


class _Versions:
    """Keeps observed tensors, and detects whether the model has overwritten any of them since."""

    def __init__(self) -> None:
        self.seen: list[tuple[torch.Tensor, int]] = []

    def __call__(self, value: Any) -> Any:
        self.seen.extend((tensor, tensor._version) for tensor in tensors_in(value))
        return value

    @property
    def changed(self) -> bool:
        return any(tensor._version != version for tensor, version in self.seen)


class _Copies:
    """Copies observed tensors, each one once, so that layers that read the same tensor can still be recognised."""

    changed = False

    def __init__(self) -> None:
        self.known: dict[tuple[int, int], tuple[torch.Tensor, torch.Tensor]] = {}

    def __call__(self, value: Any) -> Any:
        return map_tensors(value, self._own)

    def _own(self, _: int, tensor: torch.Tensor) -> torch.Tensor:
        key = id(tensor), tensor._version
        if key not in self.known:
            self.known[key] = tensor, tensor.clone()  # keep a reference to the original, or its id might be reused
        return self.known[key][1]
