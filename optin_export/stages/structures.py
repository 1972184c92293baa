"""The units of a run's model: declared by families, or measured; for a model without weights, on random ones."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import torch
from torch import nn

from optin_export import pruning
from optin_export.data import Sources
from optin_export.errors import InputError
from optin_export.models import TaskModel, build, untraced
from optin_export.units import Family, Structure, find_structure, is_covered, load_own_family
from optin_export.workdir.files import sha256_json

#: Maximum bytes of the random weights that a check creates.
MOST_BYTES = 1 << 29
#: Results for looked-up models, by what they depend on.
Measured = dict[str, Structure | InputError]


class NotMeasured(Exception):
    """The units of this looked-up model can only be found on its weights, that is when a run starts."""


def units_of(sources: Sources, coupled: bool, kinds: Collection[str], measured: Measured | None = None) -> Structure:
    """The structure as declared by families, or found and verified by measurement.

    measured: for looked-up models, what was measured before; it is extended. Raises InputError if no unit of these
    kinds can be removed, and NotMeasured for a looked-up model whose units are found when a run starts.
    """
    own = load_own_family(sources.recipe.model.family)
    model, inputs = sources.model, sources.fixed(2)
    if not sources.loaded.looked_up:
        return pruning.verified(model, find_structure(model, coupled, kinds, inputs, own=own), inputs)
    try:
        declared = find_structure(model, coupled, kinds, inputs, own=own, measure=False)
        if coupled or is_covered(model, declared, inputs):
            return declared
    except InputError:
        if coupled:
            raise
    return _of_random_weights(sources, tuple(kinds), own, {} if measured is None else measured)


def _of_random_weights(
    sources: Sources, kinds: tuple[str, ...], own: Sequence[Family], measured: Measured
) -> Structure:
    inputs, recipe = sources.fixed(2), sources.recipe
    shapes = {name: tuple(tensor.shape) for name, tensor in inputs.items()}
    key = sha256_json([sources.loaded.architecture, recipe.model.family, recipe.seed, kinds, shapes])
    if key not in measured:
        with untraced():
            model = _built(sources)
            try:
                measured[key] = pruning.verified(model, find_structure(model, False, kinds, inputs, own=own), inputs)
            except InputError as error:
                measured[key] = error
    result = measured[key]
    if isinstance(result, InputError):
        raise result
    return result


def _built(sources: Sources) -> TaskModel:
    """The looked-up model with random weights. Raises NotMeasured if it is too large or cannot be built."""
    size = sum(one.numel() * one.element_size() for one in sources.model.parameters())
    if size > MOST_BYTES:
        raise NotMeasured(f"units are found by measurement when the run starts: {size / 2**30:.1f} GiB of weights")
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(sources.recipe.seed)
            model = build(dict(sources.loaded.architecture), trust_python=True)  # the lookup has executed it already
            _vary(model)
        with torch.no_grad():
            output: Any = model(**sources.fixed(2))
    except Exception as error:  # libraries raise any type
        raise NotMeasured(
            f"units are found by measurement when the run starts: with random weights the model cannot be built "
            f"({type(error).__name__}: {error})"[:300]
        ) from None
    if not torch.isfinite(output).all():
        raise NotMeasured(
            "units are found by measurement when the run starts: with random weights the output is not finite"
        )
    return model.eval().requires_grad_(False)


@torch.no_grad()
def _vary(model: nn.Module) -> None:
    """Add noise to constant parameters (zeros or ones of norms and layer scales): they would hide dependencies."""
    for parameter in model.parameters():
        values = parameter.flatten()
        if parameter.is_floating_point() and len(values) > 1 and bool((values == values[0]).all()):
            parameter.add_(0.1 * torch.randn_like(parameter))
