"""Distillation as a repair, or a short fine-tune: off by default; it changes weights, not layers.

The built-in loop is AdamW with warm-up and cosine decay on one of two losses: distillation from the unpruned model
(see `distillation`) or labels (cross entropy; squared error for regression). A recipe may name a user's function
instead.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from optin_export.data import Batch, Training
from optin_export.data.in_memory import PIXELS
from optin_export.errors import InputError
from optin_export.models import TaskModel
from optin_export.models.loading import call_python
from optin_export.progress import phase, track
from optin_export.recipe import FinetuneSection
from optin_export.repair.distillation import Distillation
from optin_export.units import Structure

#: Share of the steps in which the learning rate rises, and the norm to which gradients are clipped.
WARM_UP, CLIP = 0.1, 1.0
#: How often the held-out rows are looked at; the best of these models is kept.
CHECKS = 4
#: Learning rates of `learning_rate: auto`, and the minimum number of steps for which one is tried.
RATES, LEAST_STEPS = (3e-5, 1e-4, 3e-4, 1e-3), 10
#: Largest difference, relative to the output, between the returned model and our layers with its weights.
SAME_OUTPUT = 1e-3


#: (model, batch) -> a scalar.
LossOf = Callable[[TaskModel, Batch], torch.Tensor]


@dataclass(frozen=True)
class Losses:
    """descended: what training lowers; judged: what decides on held-out rows."""

    descended: LossOf
    judged: LossOf


@dataclass(frozen=True)
class FineTune:
    """A summary of the fine-tune. by: `distill`, `labels`, or the user's function; steps: after which the model was
    best on held-out rows, None for the user's function.

    before, after: the loss on held-out rows. note: why the repaired model was kept, if it was.
    """

    by: str
    steps: int | None
    before: float | None
    after: float | None
    note: str | None = None

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def fine_tune(
    original: TaskModel,
    structure: Structure,
    repaired: TaskModel,
    training: Training,
    held_out: Sequence[Batch],
    section: FinetuneSection,
    *,
    temperature: float = 1.0,
    seed: int = 0,
) -> tuple[TaskModel, FineTune]:
    """A fine-tuned copy of `repaired` and a summary; `repaired` itself if the built-in loop did not help.

    structure: that of `original`. It helped if every loss was finite and the loss on `held_out`, for distillation the
    divergence of the outputs alone, did not rise. Raises InputError for labels without a class in the model, and for a
    user's function that fails, changes the layers or returns unusable weights.
    """
    distillation = Distillation(original, structure, temperature)
    losses = Losses(_label_loss, _label_loss) if section.labelled else Losses(distillation, distillation.output)
    if section.labelled:
        _check_labels(repaired, training, held_out)
    before, steps = _mean_loss(losses.judged, repaired, held_out), section.steps
    with torch.random.fork_rng(devices=[]), torch.enable_grad():
        torch.manual_seed(seed)
        if section.source is not None:
            tuned = _by_the_user(section.source, original, repaired, training, held_out[0])
            return tuned, FineTune(section.source, None, before, _mean_loss(losses.judged, tuned, held_out))
        if not section.labelled:
            distillation.begin(repaired, held_out)
        rate = section.learning_rate
        if rate == "auto":
            rate = _best_rate(repaired, losses, training, held_out, section)
        tuned, after, steps, note = _descend(repaired, losses, training, held_out, section, section.steps, rate)
    if note is None and (before is None or after is None or after > before):
        note = f"the loss on held-out rows went from {_shown(before)} to {_shown(after)}"
    outcome = FineTune("labels" if section.labelled else "distill", steps, before, after, note)
    return (tuned if note is None else repaired), outcome


def _descend(
    repaired: TaskModel,
    losses: Losses,
    training: Training,
    held_out: Sequence[Batch],
    section: FinetuneSection,
    steps: int,
    learning_rate: float,
    checks: int = CHECKS,
) -> tuple[TaskModel, float | None, int, str | None]:
    """Train for this number of steps; returns the model at the best of `checks` looks at the held-out rows, its loss
    there, its number of steps, and the reason if training failed."""
    # In eval mode: a few hundred steps need no dropout, and are too few to re-estimate a batch norm's statistics.
    tuned = copy.deepcopy(repaired).requires_grad_(True)
    optimizer = torch.optim.AdamW(tuned.parameters(), lr=learning_rate)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _rate(step, steps))
    looks = {-(-steps * (check + 1) // checks) for check in range(checks)}
    best: tuple[float, int, TaskModel] | None = None
    phase("fine-tuning", until=1.0)
    for step, batch in zip(track(range(steps)), _forever(training), strict=False):
        loss = losses.descended(tuned, mirrored(batch) if section.flips and not section.labelled else batch)
        if not torch.isfinite(loss):
            return repaired, None, steps, f"the loss was not finite at step {step + 1}"
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(tuned.parameters(), CLIP)
        optimizer.step()
        schedule.step()
        if step + 1 in looks:
            found = _mean_loss(losses.judged, tuned, held_out)
            if found is not None and _is_finite(tuned) and (best is None or found < best[0]):
                best = found, step + 1, copy.deepcopy(tuned).requires_grad_(False)
    if best is None:
        return repaired, None, steps, "its weights or its loss were not finite"
    return best[2], best[0], best[1], None


def _best_rate(
    repaired: TaskModel,
    losses: Losses,
    training: Training,
    held_out: Sequence[Batch],
    section: FinetuneSection,
) -> float:
    """The best of RATES on the held-out rows after a tenth of the steps; higher ones than a worse one are not tried."""
    found: list[float] = []
    steps = min(max(LEAST_STEPS, section.steps // 10), section.steps)
    for rate in RATES:
        loss = _descend(repaired, losses, training, held_out, section, steps, rate, checks=1)[1]
        if found and (loss is None or loss >= found[-1]):
            break
        found.append(math.inf if loss is None else loss)
    return RATES[found.index(min(found))]


def _rate(step: int, steps: int) -> float:
    """Factor of the learning rate: a linear rise, then half a cosine down to zero."""
    rise = max(1, round(WARM_UP * steps))
    if step < rise:
        return (step + 1) / rise
    return 0.5 * (1 + math.cos(math.pi * (step - rise) / max(1, steps - rise)))


def _forever(training: Training) -> Iterator[Batch]:
    while True:
        yield from training


def mirrored(batch: Batch) -> Batch:
    """The batch with each of its images mirrored left to right with probability 1/2; other rows as they are.

    The unpruned model sees the same image, so nothing is assumed about what a mirrored image shows.
    """
    images = batch.inputs.get(PIXELS)
    if images is None or images.dim() != 4:
        return batch
    chosen = (torch.rand(len(images)) < 0.5).to(images.device).view(-1, 1, 1, 1)
    return replace(batch, inputs={**batch.inputs, PIXELS: torch.where(chosen, images.flip(-1), images)})


def _label_loss(model: TaskModel, batch: Batch) -> torch.Tensor:
    assert batch.targets is not None
    output, targets = model(**batch.inputs), torch.from_numpy(np.asarray(batch.targets))
    if model.output_kind == "regression":
        return F.mse_loss(output.squeeze(-1), targets.to(output))
    return F.cross_entropy(output, targets.long())


def _check_labels(model: TaskModel, training: Training, held_out: Sequence[Batch]) -> None:
    if model.output_kind == "regression":
        return
    with torch.no_grad():
        classes = model(**held_out[0].inputs).shape[-1]
    parts = [training.labels, *(batch.targets for batch in held_out)]
    labels = np.concatenate([np.asarray(part) for part in parts])
    wrong = labels[(labels < 0) | (labels >= classes) | (labels != np.floor(labels))]
    if len(wrong):
        raise InputError(
            f"cannot fine-tune on the label {wrong[0]:g}",
            f"the model has the classes 0 to {classes - 1}",
            "correct finetune.data",
        )


def _mean_loss(loss_of: LossOf, model: TaskModel, batches: Sequence[Batch]) -> float | None:
    """The mean loss over all rows; None if it is not finite."""
    with torch.no_grad():
        total = sum(float(loss_of(model, batch)) * len(batch.rows) for batch in batches)
    mean = total / sum(len(batch.rows) for batch in batches)
    return mean if math.isfinite(mean) else None


def _by_the_user(source: str, original: TaskModel, repaired: TaskModel, training: Training, batch: Batch) -> TaskModel:
    """Call the user's function on copies of both models, and load the resulting weights into our own layers."""
    given = copy.deepcopy(repaired).requires_grad_(True)
    returned = call_python(source, {}, given, copy.deepcopy(original), training)
    if not isinstance(returned, nn.Module):
        raise InputError(
            f"'{source}' returned no model", f"it returned a {type(returned).__name__}", "return the dense model"
        )
    tuned = copy.deepcopy(repaired)
    shapes, found = (
        {name: tuple(tensor.shape) for name, tensor in one.state_dict().items()} for one in (tuned, returned)
    )
    if shapes != found:
        name = sorted(dict(set(shapes.items()) ^ set(found.items())))[0]
        why = f"{name} is {found.get(name, 'gone')}, it was {shapes.get(name, 'not there')}"
        raise InputError(f"'{source}' changed the architecture", why, "train the weights of the model it is given only")
    if not _is_finite(returned):
        raise InputError(f"'{source}' gave weights that are not finite", "training diverged", "lower its learning rate")
    tuned.load_state_dict(returned.state_dict())
    with torch.no_grad():
        ours, theirs = tuned(**batch.inputs), returned.eval()(**batch.inputs)
    if ours.shape != theirs.shape or (ours - theirs).abs().max() > SAME_OUTPUT * ours.abs().max():
        raise InputError(
            f"'{source}' changed the architecture",
            "its weights in the layers it was given compute something else",
            "train the weights of the model it is given only",
        )
    return tuned.requires_grad_(False)


def _is_finite(model: nn.Module) -> bool:
    return all(torch.isfinite(tensor).all() for tensor in model.state_dict().values() if tensor.is_floating_point())


def _shown(value: float | None) -> str:
    return "not finite" if value is None else f"{value:.4g}"
