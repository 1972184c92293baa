"""Replace attentions by smaller ones, whose queries and keys have fewer dimensions per head than their values."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from optin_export.errors import InputError
from optin_export.models import Inputs, TaskModel
from optin_export.models.equivalents import NarrowAttention, NarrowSelfAttention
from optin_export.units import QueryKeys, get_layer, get_module, set_module, tensor_in

#: Largest relative difference between the outputs of a model and of one whose attentions are replaced.
TOLERANCE = 1e-4


@torch.no_grad()
def narrowable(model: TaskModel, attentions: Sequence[QueryKeys], inputs: Inputs) -> tuple[QueryKeys, ...]:
    """Those attentions whose replacement, with all dimensions, computes the same on these inputs.

    It is tried in `model`, and taken out again.
    """
    if not attentions:
        return ()
    wanted, before = model(**inputs), {one.path: get_module(model, one.path) for one in attentions}

    def same(some: Sequence[QueryKeys]) -> bool:
        try:
            narrow(model, some, {one.name: one.count for one in some})
            error = (model(**inputs) - wanted).abs().max()
            return bool(error <= TOLERANCE * wanted.abs().max())
        except Exception:  # the model's own code, which may call the attention in another way
            return False
        finally:
            for one in some:
                set_module(model, one.path, before[one.path], everywhere=True)

    return tuple(attentions) if same(attentions) else tuple(one for one in attentions if same([one]))


@torch.no_grad()
def narrow(model: TaskModel, attentions: Sequence[QueryKeys], dimensions: Mapping[str, int]) -> None:
    """Replace attentions by smaller ones, whose queries and keys have fewer dimensions, in place.

    dimensions: `QueryKeys.name` -> dimensions per head that stay. The model computes the same as before if its products
    q k^T have no higher rank (see `repair.query_keys`). Otherwise it uses the nearest ones of that rank,
    for inputs of equal variance.
    """
    known = {one.name: one for one in attentions}
    for name, count in dimensions.items():
        one = known.get(name)
        if one is None or not 0 < count <= one.count:
            raise InputError(
                f"the plan is not for this model: {name} with {count} dimensions",
                "none of its attentions can have them" if one is None else f"the attention has {one.count}",
                "search again with this model",
            )
        set_module(model, one.path, _smaller(model, one, count), everywhere=True)


def _smaller(model: TaskModel, one: QueryKeys, count: int) -> nn.Module:
    """An attention like the one in `model`, with `count` dimensions of queries and keys per head."""
    original: Any = get_module(model, one.path)
    query, key = (one.heads_of(rows_of(model, one, which)) for which in ("query", "key"))
    heads, parts = len(query), [part.flatten(0, 1) for part in factors(query, key, count)]
    smaller: Any
    if one.is_fused:
        layer = get_layer(model, one.query)
        values = _with_bias(layer)[one.rows(len(layer.weight), "key").stop :]
        smaller = NarrowAttention(original, heads, count)
        layers, parts = [smaller.qkv], [torch.cat([*parts, values])]
    else:
        smaller = NarrowSelfAttention(original, heads, count)
        layers = [getattr(smaller, name) for name in smaller.names[:2]]
    for layer, rows in zip(layers, parts, strict=True):
        layer.weight.copy_(rows[:, :-1])
        layer.bias.copy_(rows[:, -1])
    # MPNet's numbers of the heads, and what selects their position bias.
    for name, buffer in original.named_buffers(recurse=False):
        smaller.register_buffer(name, buffer)
    for hooks in ("_forward_pre_hooks", "_forward_pre_hooks_with_kwargs"):
        getattr(smaller, hooks).update(getattr(original, hooks))
    return smaller.requires_grad_(False).train(original.training)


def rows_of(model: TaskModel, one: QueryKeys, which: str) -> torch.Tensor:
    """The weights and the bias of all heads' queries ("query") or keys ("key"): float64 [rows, inputs + 1]."""
    layer = get_layer(model, one.query if which == "query" else one.key)
    return _with_bias(layer)[one.rows(len(layer.weight), which)]


def _with_bias(layer: Any) -> torch.Tensor:
    """Weights and bias of a linear layer, float64 [outputs, inputs + 1]."""
    weight = tensor_in(layer, "weight")
    bias = weight.new_zeros(len(weight)) if layer.bias is None else tensor_in(layer, "bias")
    return torch.cat([weight, bias[:, None]], 1).double()


def factors(query: torch.Tensor, key: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The `count` largest parts of q^T k, halved between both: query, key [heads, dimensions, inputs + 1] -> the same
    with `count` dimensions.

    With q^T = Q_1 R_1 and k^T = Q_2 R_2, the parts of R_1 R_2^T = U S V^T are those of q^T k.
    """
    (left, first), (right, second) = (torch.linalg.qr(one.mT) for one in (query, key))
    u, sizes, v = torch.linalg.svd(first @ second.mT)
    root = sizes[:, None, :count].sqrt()
    return (left @ u[:, :, :count] * root).mT, (right @ v.mT[:, :, :count] * root).mT
