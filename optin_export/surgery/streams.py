"""Two models walked block by block over the calibration batches, each layer seen while it runs."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any, Literal

import torch
from torch import nn

from optin_export.families import (
    Structure,
    get_module,
    replayed,
    stopped_after,
    tensor_of,
)
from optin_export.sources import Batch, TaskModel
from optin_export.spill import Spill
from optin_export.surgery.tokens import Merged, flow_of

#: Where something is seen: a module's path, and the index of its positional argument, its output, or its whole call.
Point = tuple[str, int | Literal["output", "call"]]


class Stream:
    """One model walked block by block: each batch's output of the last block walked past is kept and replayed.

    merged: of a model that merges tokens, per batch where each token of the unmerged stream has gone, [batch, tokens],
    and how many there are, at the module at which the last pass over that batch stopped.
    """

    def __init__(self, model: TaskModel, structure: Structure, batches: Sequence[Batch]) -> None:
        self.model, self.blocks, self.batches = model, structure.blocks, batches
        self.hollow: list[dict[str, Any]] = [{} for _ in batches]
        self.store = _store()
        self.lasting = {path: _store() for path in structure.read_later}
        self.last: str | None = None
        self.flow = flow_of(model)
        if self.flow is not None:
            self.flow.trace = True
        self.behind: dict[int, Merged] = {}
        self.merged: dict[int, Merged] = {}

    def see(self, index: int, points: Sequence[Point], until: str) -> dict[Point, Any]:
        """Run batch `index` up to the module `until`, computing only what lies after the blocks walked so far."""
        behind = dict(self.hollow[index])
        behind |= {path: store[index] for path, store in self.lasting.items() if path in behind}
        if self.last is not None:
            behind[self.last] = self.store[index]
        if self.flow is not None:
            self.flow.restore(self.behind.get(index))
        with (
            torch.no_grad(),
            replayed(self.model, behind),
            _seen(self.model, points) as values,
            stopped_after(self.model, until) as forward,
        ):
            forward(self.batches[index].inputs)
        if self.flow is not None:
            self.merged[index] = self.flow.state()
        return values

    def advance(self, block: int) -> None:
        """Walk past `block`: remember its output for every batch."""
        path = self.blocks[block]
        for index in range(len(self.batches)):
            output = self.see(index, [(path, "output")], path)[(path, "output")]
            # Blocks feed one another in order (see Structure), so what else lies further behind is never read again.
            if path in self.lasting:
                self.lasting[path][index] = _light(output)
            self.hollow[index][path] = _hollow(output)
            self.store[index] = _light(output)
            if self.flow is not None:
                self.behind[index] = self.merged[index]
        self.last = path

    def like(self, index: int, value: Any) -> torch.Tensor:
        """What a model that merges nothing has where the last pass stopped, averaged as the tokens here are merged."""
        tensor, merged = tensor_of(value).cpu(), self.merged.get(index)
        return tensor if merged is None or tensor.dim() != 3 else merged.means(tensor)

    def weights_like(self, index: int, weights: torch.Tensor | None) -> torch.Tensor | None:
        """[rows]: the weights of that model's rows; a merged token has those of all that it stands for."""
        merged = self.merged.get(index)
        if weights is None or merged is None or len(weights) != merged.place.numel():
            return weights
        return merged.sums(weights.view(*merged.place.shape, 1)).flatten()

    def close(self) -> None:
        if self.flow is not None:
            self.flow.trace = False
        for store in (self.store, *self.lasting.values()):
            store.close()


def _store() -> Spill:
    return Spill("the repair", "use fewer data.calibration.samples")


def _light(output: Any) -> Any:
    """The hidden states as they are; what else a block returns (attention weights) hollow: no block reads it."""
    return output if isinstance(output, torch.Tensor) else (tensor_of(output), *_hollow(tuple(output[1:])))


def _hollow(output: Any) -> Any:
    """Zeros of the same shape that occupy no memory."""
    if isinstance(output, torch.Tensor):
        return output.new_zeros(()).expand(output.shape)
    return tuple(_hollow(part) if isinstance(part, torch.Tensor) else part for part in output)


@contextlib.contextmanager
def _seen(model: nn.Module, points: Sequence[Point]) -> Iterator[dict[Point, Any]]:
    values: dict[Point, Any] = {}

    def before(point: Point) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            values[point] = (args, kwargs) if point[1] == "call" else args[point[1]]  # type: ignore[index]

        return hook

    def after(point: Point) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            values[point] = output

        return hook

    with contextlib.ExitStack() as stack:
        for point in points:
            module = get_module(model, point[0])
            handle = (
                module.register_forward_hook(after(point))
                if point[1] == "output"
                else module.register_forward_pre_hook(before(point), with_kwargs=True)
            )
            stack.callback(handle.remove)
        yield values
