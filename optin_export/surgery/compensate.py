"""Sequential least squares: every output projection is refitted so that the smaller model lands on the original's path.

For each sub-layer, in forward order, with activations h of the original and h' of the already repaired smaller model:

    min over (W', b') of || (h + W a + b) - (h' + W' a' + b') ||^2 + rho || [W' b'] - [W_kept b] ||^2

a' are the kept inputs in the smaller model, so errors from upstream are corrected too. Unlabelled calibration data
only; no gradients (docs/method.md, section 4).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from optin_export.families import (
    Structure,
    UnitGroup,
    block_outputs,
    get_linear,
    get_module,
    replayed,
    rows_of,
    stopped_after,
    tensor_of,
    valid_rows,
)
from optin_export.sources import Batch, Inputs, TaskModel
from optin_export.surgery.rebuild import Constant

#: rho as a share of the mean diagonal of the Gram matrix.
DAMPING = 1e-2


@dataclass(frozen=True)
class Repair:
    """Squared error of one sub-layer's output on the residual stream, per element, before and after its refit."""

    before: float
    after: float


class _Stream:
    """One model walked block by block: each batch's outputs of the blocks behind are kept and replayed."""

    def __init__(self, model: TaskModel, blocks: Sequence[str], batches: Sequence[Batch]) -> None:
        self.model, self.blocks, self.batches = model, blocks, batches
        self.behind: list[dict[str, Any]] = [{} for _ in batches]

    def run(self, index: int, block: int) -> None:
        """Run batch `index` up to `block`, computing only what lies after the blocks walked so far."""
        with (
            torch.no_grad(),
            replayed(self.model, self.behind[index]),
            stopped_after(self.model, self.blocks[block]) as forward,
        ):
            forward(self.batches[index].inputs)

    def advance(self, block: int) -> None:
        """Walk past `block`: remember its output for every batch."""
        for index in range(len(self.batches)):
            with block_outputs(self.model, [self.blocks[block]]) as outputs:
                self.run(index, block)
            # Blocks feed one another in order (see Structure), so what lies further behind is never read again.
            earlier = {path: _hollow(output) for path, output in self.behind[index].items()}
            self.behind[index] = earlier | dict(outputs)


def _hollow(output: Any) -> Any:
    """Zeros of the same shape that occupy no memory."""
    if isinstance(output, torch.Tensor):
        return output.new_zeros(()).expand(output.shape)
    return tuple(_hollow(part) if isinstance(part, torch.Tensor) else part for part in output)


def compensate(
    original: TaskModel,
    dense: TaskModel,
    structure: Structure,
    smaller: Structure,
    batches: Sequence[Batch],
    tick: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, Repair]:
    """Refit, in place, the output projection of every sub-layer of `dense`; returns the errors by group key.

    structure, smaller: the structures of `original` and `dense`. Groups that lost nothing are refitted as well: they
    correct what reaches them from upstream.
    """
    source = _Stream(original, structure.blocks, batches)
    target = _Stream(dense, structure.blocks, batches)
    repairs: dict[str, Repair] = {}
    pairs = list(zip(structure.groups, smaller.groups, strict=True))
    for block in range(len(structure.blocks)):
        here = [(group, small) for group, small in pairs if group.block == block]
        wanted = _wanted(source, block, [group for group, _ in here])
        for group, small in here:
            repairs[group.key] = _refit(target, block, small, wanted[group.key])
            tick(len(repairs), len(pairs))
        source.advance(block)
        target.advance(block)
    return repairs


def _wanted(stream: _Stream, block: int, groups: Sequence[UnitGroup]) -> dict[str, list[torch.Tensor]]:
    """Per group and batch: the residual stream right after the sub-layer in the original model, [rows, hidden]."""
    wanted: dict[str, list[torch.Tensor]] = {group.key: [] for group in groups}
    for index, batch in enumerate(stream.batches):
        with contextlib.ExitStack() as stack:
            seen = {group.key: stack.enter_context(_watch(stream.model, group)) for group in groups}
            stream.run(index, block)
        for group in groups:
            _, residual, output = seen[group.key].rows(batch.inputs)
            wanted[group.key].append(residual + output * _scale(stream.model, group))
    return wanted


def _refit(stream: _Stream, block: int, group: UnitGroup, wanted: Sequence[torch.Tensor]) -> Repair:
    weight, bias = _parameters(stream.model, group)
    scale = _scale(stream.model, group)
    start = torch.cat([weight, bias[:, None]], 1).double().T  # [kept + 1, hidden]
    gram = torch.zeros(len(start), len(start), dtype=torch.float64)
    cross, power, before, count = torch.zeros_like(start), 0.0, 0.0, 0
    for index, batch in enumerate(stream.batches):
        with _watch(stream.model, group) as seen:
            stream.run(index, block)
        inputs, residual, output = seen.rows(batch.inputs)
        # The sub-layer has to add what is missing between the two streams. Layer scale is divided out; where it is
        # zero, nothing can be added and the output stays as it is.
        missing = torch.where(scale == 0, output, (wanted[index] - residual) / scale).double()
        design = torch.cat([inputs, torch.ones(len(inputs), 1)], 1).double()
        gram += design.T @ design
        cross += design.T @ missing
        power += float(missing.square().sum())
        before += float((missing - output.double()).square().sum())
        count += missing.numel()
    rho = DAMPING * gram.diagonal().mean()
    damped = gram + rho * torch.eye(len(gram), dtype=torch.float64)
    solution = torch.linalg.solve(damped, cross + rho * start)
    after = power - 2 * float((solution * cross).sum()) + float((solution * (gram @ solution)).sum())
    weight.copy_(solution[:-1].T)
    bias.copy_(solution[-1])
    # The quadratic form cancels down to rounding noise where nothing is left to repair.
    return Repair(before=before / count, after=max(after, 0.0) / count)


@dataclass
class _Seen:
    """One pass through one sub-layer: the consumer's input and output, and the residual stream beside it."""

    group: UnitGroup
    inputs: torch.Tensor | None = None
    output: torch.Tensor | None = None
    residual: torch.Tensor | None = None

    def rows(self, inputs: Inputs) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """(consumer input [rows, kept], residual [rows, hidden], consumer output [rows, hidden]), without padding."""
        assert self.residual is not None and self.output is not None
        valid = valid_rows(inputs, self.residual)
        residual = rows_of(self.residual, valid)
        if self.inputs is None:  # a dropped sub-layer: no inputs, the same constant for every row
            return residual.new_zeros(len(residual), 0), residual, self.output.expand_as(residual)
        return rows_of(self.inputs, valid), residual, rows_of(self.output, valid)


@contextlib.contextmanager
def _watch(model: TaskModel, group: UnitGroup) -> Iterator[_Seen]:
    seen = _Seen(group)
    residual_path, argument = group.residual
    dropped = group.count == 0

    def see_residual(module: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        seen.residual = args[argument]

    def see_output(module: nn.Module, args: tuple[torch.Tensor, ...], output: Any) -> None:
        seen.output = tensor_of(output)
        seen.inputs = None if dropped else args[0]

    with contextlib.ExitStack() as stack:
        consumer = get_module(model, group.sublayer if dropped else group.consumer)
        stack.callback(get_module(model, residual_path).register_forward_pre_hook(see_residual).remove)
        stack.callback(consumer.register_forward_hook(see_output).remove)
        yield seen


def _parameters(model: TaskModel, group: UnitGroup) -> tuple[torch.Tensor, torch.Tensor]:
    """(weight [hidden, kept], bias [hidden]) of the projection, to be overwritten in place."""
    if group.count == 0:
        constant = get_module(model, group.sublayer)
        assert isinstance(constant, Constant)
        return constant.bias.new_zeros(len(constant.bias), 0), constant.bias
    consumer = get_linear(model, group.consumer)
    if consumer.bias is None:
        consumer.bias = nn.Parameter(torch.zeros(consumer.out_features), requires_grad=False)
    return consumer.weight, consumer.bias


def _scale(model: TaskModel, group: UnitGroup) -> torch.Tensor:
    """Layer scale between the projection and the residual stream, [hidden]; a single 1 without one."""
    if group.scale is None:
        return torch.ones(())
    gamma = get_module(model, group.scale).gamma
    assert isinstance(gamma, torch.Tensor)
    return gamma.detach()
