"""The loss of distillation: how far a smaller model's output and blocks are from the unpruned model's on the same rows.

    loss  =  D(output) / D0  +  mean over blocks of  || h - h' ||^2 / || h - mean h ||^2  / H0

D: the divergence of outputs (KL for logits, Hinton et al., 2015; squared error for regression and normalised
embeddings); h, h': a block's outputs (FitNets, Romero et al., 2015). D0 and H0 are both terms before training, so that
neither needs a weight of its own. The blocks' term has a gradient for every layer from every token, which a few hundred
rows do not give through the output alone.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from optin_export.data import Batch
from optin_export.models import TaskModel, as_rows, block_inputs, counted_rows
from optin_export.objective import divergence
from optin_export.pruning.token_merging import MergedTokens, flow_of
from optin_export.units import Structure, block_outputs, capture, tensor_of


class Distillation:
    """The loss of models against `original` (whose structure this is), in eval mode and on the same inputs."""

    def __init__(self, original: TaskModel, structure: Structure, temperature: float) -> None:
        self.original, self.structure, self.temperature = original, structure, temperature
        self.scales = (1.0, 1.0)

    def begin(self, model: TaskModel, batches: Sequence[Batch]) -> None:
        """Measure both terms of this model, before it is trained; from then on they are relative to these."""
        with torch.no_grad():
            found = [self.terms(model, batch) for batch in batches]
        means = [float(torch.stack(one).mean()) for one in zip(*found, strict=True)]
        self.scales = (means[0] if means[0] > 0 else 1.0, means[1] if means[1] > 0 else 1.0)

    def __call__(self, model: TaskModel, batch: Batch) -> torch.Tensor:
        """The mean over the batch; a scalar in the graph of `model`."""
        output, blocks = self.terms(model, batch)
        return output / self.scales[0] + blocks / self.scales[1]

    def output(self, model: TaskModel, batch: Batch) -> torch.Tensor:
        """The divergence of the outputs alone."""
        with torch.no_grad():
            wanted = self.original(**batch.inputs)
        return self._divergence(model, wanted, model(**batch.inputs), batch)

    def terms(self, model: TaskModel, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        """(divergence of the outputs, mean relative squared error of the blocks' outputs)."""
        paths, rewritten = self.structure.observed, self.structure.rewritten
        with torch.no_grad(), block_outputs(self.original, paths, rewritten) as wanted:
            target = self.original(**batch.inputs)
        with merged_tokens(model, paths) as merged, block_outputs(model, paths, rewritten) as given:
            output = model(**batch.inputs)
        mask, errors = block_inputs(model, batch.inputs).get("attention_mask"), []
        for path in paths:
            if path not in wanted or path not in given:
                continue
            stream, smaller = tensor_of(wanted[path]), tensor_of(given[path])
            tokens = merged.get(path)
            smaller = smaller if tokens is None else tokens.spread(smaller)
            if stream.shape == smaller.shape:  # not where channels of the stream itself left
                errors.append(relative_error(stream, smaller, mask, path in self.structure.channels_first))
        mean = torch.stack(errors).mean() if errors else output.new_zeros(())
        return self._divergence(model, target, output, batch), mean

    def _divergence(self, model: TaskModel, wanted: torch.Tensor, given: torch.Tensor, batch: Batch) -> torch.Tensor:
        target, rows = (as_rows(model, output, batch.inputs) for output in (wanted, given))
        losses = divergence(model.output_kind, target, rows, self.temperature)
        counted = counted_rows(model, wanted, batch.inputs)
        return losses.mean() if counted is None else losses[counted].mean()


def relative_error(
    wanted: torch.Tensor, given: torch.Tensor, mask: torch.Tensor | None, channels_first: bool
) -> torch.Tensor:
    """|| wanted - given ||^2 / || wanted - its mean over samples and tokens ||^2, without padding.

    wanted, given: [batch, tokens, features], or [batch, features, ...] with channels_first; mask: [batch, tokens].
    """
    if channels_first and wanted.dim() > 2:
        wanted, given = (one.movedim(1, -1) for one in (wanted, given))
    if mask is not None and mask.shape == wanted.shape[:2]:
        wanted, given = (one[mask.bool()] for one in (wanted, given))
    wanted, given = (one.reshape(-1, one.shape[-1]) for one in (wanted, given))
    power = (wanted - wanted.mean(0)).square().sum()
    return (wanted - given).square().sum() / power.clamp(min=torch.finfo(power.dtype).tiny)


@contextlib.contextmanager
def merged_tokens(model: TaskModel, blocks: Sequence[str]) -> Iterator[dict[str, MergedTokens]]:
    """Collect which tokens are merged behind each of these blocks in a pass; nothing for a model that merges none."""
    flow, found = flow_of(model), dict[str, MergedTokens]()
    if flow is None:
        yield found
        return
    state, before = flow.state, flow.trace

    def after(path: str, args: tuple[Any, ...], output: Any) -> None:
        found[path] = state()

    flow.trace = True
    try:
        with capture(model, outputs=dict.fromkeys(blocks, after)):
            yield found
    finally:
        flow.trace = before
