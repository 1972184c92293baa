"""Access modules by paths, and change forward passes: masks on units, replay of a prefix, other weights."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from optin_export.models import gathered
from optin_export.units.capture import SeeInputs, capture
from optin_export.units.declare import UnitGroup
from optin_export.units.outputs import copied, map_tensors

#: Layers that read and make [batch, features, positions, ...].
Transposed = nn.ConvTranspose1d | nn.ConvTranspose2d | nn.ConvTranspose3d
Convolution = nn.Conv1d | nn.Conv2d | nn.Conv3d | Transposed
Layer = nn.Linear | Convolution


def get_module(model: nn.Module, path: str) -> nn.Module:
    return model.get_submodule(path)


def get_scale(model: nn.Module, path: str) -> nn.Module | torch.Tensor:
    """A `UnitGroup.scale`: the batch norm, or the factors of a layer scale."""
    parent, _, name = path.rpartition(".")
    owner = model.get_submodule(parent)
    found = getattr(owner, name)
    if hasattr(found, "gamma"):
        owner, name, found = found, "gamma", found.gamma
    assert isinstance(found, nn.Module | torch.Tensor), f"{path} is declared as a scale but is a {type(found).__name__}"
    return tensor_in(owner, name) if isinstance(found, torch.Tensor) else found


def get_layer(model: nn.Module, path: str) -> Layer:
    """A producer or consumer."""
    module = model.get_submodule(path)
    assert isinstance(module, Layer), f"{path} is declared as a layer but is a {type(module).__name__}"
    return module


def get_weight(layer: Layer) -> torch.Tensor:
    """A view of a layer's weight as [out features, in features, ...]."""
    weight = layer.weight.detach()
    return weight.transpose(0, 1) if isinstance(layer, Transposed) else weight


def set_module(model: nn.Module, path: str, module: nn.Module, everywhere: bool = False) -> None:
    """Replace the module at `path` by `module`. everywhere: also under all its other names."""
    parent, _, name = path.rpartition(".")
    if everywhere:
        old = model.get_submodule(path)
        for owner in list(model.modules()):
            for alias, child in list(owner._modules.items()):  # named_children leaves duplicates out
                if child is old:
                    setattr(owner, alias, module)
    setattr(model.get_submodule(parent), name, module)


@contextlib.contextmanager
def masked(model: nn.Module, groups: Sequence[UnitGroup], masks: Mapping[str, torch.Tensor]) -> Iterator[None]:
    """Multiply every unit's slice of the input of each layer that reads it by its mask.

    masks: group key -> float [count], or [batch, count] for a mask per sample; a group without an entry is not changed.
    """

    def hook_of(group: UnitGroup) -> SeeInputs:
        def hook(path: str, args: tuple[torch.Tensor, ...], kwargs: Any) -> tuple[torch.Tensor, ...]:
            module = get_module(model, path)
            mask = _by_feature(group, path, masks[group.key], args[0].shape[_feature_dim(module)])
            return (args[0] * _fitted(mask, module, args[0], group.batch_dim).to(args[0]), *args[1:])

        return hook

    with contextlib.ExitStack() as stack:
        for group in groups:
            if group.key in masks:
                stack.enter_context(capture(model, dict.fromkeys(group.reads, hook_of(group))))
        yield


def _by_feature(group: UnitGroup, path: str, mask: torch.Tensor, features: int) -> torch.Tensor:
    """A mask [..., units] for each of the input features of a reader; 1 for features of no unit."""
    spread = mask.repeat_interleave(group.width_in(path), dim=-1)
    if group.features_in(path) is None:
        return spread
    at = torch.tensor(group.columns_of(path, range(group.count)), device=mask.device)
    return mask.new_ones(*mask.shape[:-1], features).index_copy(-1, at, spread)


def _feature_dim(module: nn.Module) -> int:
    return 1 - module.weight.dim() if isinstance(module, Convolution) else -1


def _fitted(mask: torch.Tensor, module: nn.Module, inputs: torch.Tensor, batch_dim: int) -> torch.Tensor:
    """A mask [features] or [batch, features] shaped to multiply a layer's input."""
    if mask.dim() == 2 and batch_dim:
        return mask.reshape(*[1] * batch_dim, len(mask), *[1] * (inputs.dim() - batch_dim - 2), -1)
    if mask.dim() == 2:
        # Windows of one sample lie one after another in the batch dimension.
        mask = mask.repeat_interleave(len(inputs) // len(mask), dim=0)
    if isinstance(module, Convolution):
        return mask[(..., *[None] * (module.weight.dim() - 2))]
    return mask if mask.dim() == 1 else mask.reshape(len(mask), *[1] * (inputs.dim() - 2), -1)


@contextlib.contextmanager
def replayed(model: nn.Module, outputs: Mapping[str, Any], rewritten: Collection[str] = ()) -> Iterator[None]:
    """Let the named blocks return these outputs instead of computing, so that the prefix of a pass costs nothing.

    rewritten: blocks whose output the model overwrites in place: it gets copies.
    """

    def forward_of(path: str) -> Callable[..., Any]:
        def forward(*args: Any, **kwargs: Any) -> Any:
            return copied(outputs[path]) if path in rewritten else map_tensors(outputs[path], lambda _, one: one)

        return forward

    with in_place_of(model, {path: forward_of(path) for path in outputs}):
        yield


@contextlib.contextmanager
def refitted(model: nn.Module, layers: Mapping[str, tuple[torch.Tensor, torch.Tensor]]) -> Iterator[None]:
    """Let the named layers compute with this weight and bias; their own are not changed, wherever they are stored."""

    forwards = {path: with_weights(get_layer(model, path), own) for path, own in layers.items()}
    with in_place_of(model, forwards):
        yield


def with_weights(layer: nn.Module, own: tuple[torch.Tensor, torch.Tensor]) -> Callable[[torch.Tensor], torch.Tensor]:
    """The forward of `layer` with another weight and bias."""
    other: Any = copy.copy(layer)
    named = dict(zip(("weight", "bias"), own, strict=True))

    def place(device: torch.device) -> None:
        other._parameters = {
            name: nn.Parameter(tensor.to(device), requires_grad=False) for name, tensor in named.items()
        }

    place(own[0].device)

    def forward(inputs: torch.Tensor) -> torch.Tensor:
        if other.weight.device != inputs.device:
            place(inputs.device)
        result: torch.Tensor = type(other).forward(other, inputs)
        return result

    return forward


def tensor_in(module: nn.Module, name: str) -> torch.Tensor:
    """A parameter's or buffer's values on the work device, also if accelerate offloads them until the module runs."""
    tensor = getattr(module, name).detach()
    if tensor.is_meta:
        hook: Any = module._hf_hook
        kept = next(one.weights_map for one in getattr(hook, "hooks", (hook,)) if one.weights_map is not None)
        tensor = kept[name]
    return gathered(tensor)


def channels_last(model: nn.Module, stream: torch.Tensor) -> torch.Tensor:
    """[batch, channels, height, width] -> [batch, height, width, channels] (see `UnitGroup.arrange`)."""
    return stream.permute(0, 2, 3, 1)


def reaching(block: str, norm: str, sublayer: str) -> Callable[[nn.Module, Any], torch.Tensor]:
    """An `arrange` for a residual of kind "call": the input that the block passes to its sub-layer, without the norm.

    The block runs with `norm` as identity and stops at `sublayer`, so its own code rolls, pads and cuts into windows.
    """

    def arrange(model: nn.Module, call: tuple[tuple[Any, ...], dict[str, Any]]) -> torch.Tensor:
        module, (args, kwargs), seen = get_module(model, block), call, []

        def keep(first: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
            seen.append(first)
            return first

        replaced = in_place_of(model, {norm: lambda first: first, sublayer: keep})
        with replaced, capture(model, stop=sublayer):
            module(*args, **kwargs)
        return seen[0]

    return arrange


@contextlib.contextmanager
def in_place_of(model: nn.Module, forwards: Mapping[str, Callable[..., Any]]) -> Iterator[None]:
    """Let the named modules run these functions instead of their own forward; hooks run as usual."""
    with contextlib.ExitStack() as stack:
        for path, forward in forwards.items():
            module = get_module(model, path)
            # An instance attribute shadows the class's forward; one may already exist (an accelerate hook).
            if "forward" in vars(module):
                stack.callback(setattr, module, "forward", vars(module)["forward"])
            else:
                stack.callback(delattr, module, "forward")
            module.forward = forward
        yield


def valid_rows(inputs: Mapping[str, torch.Tensor], like: torch.Tensor) -> torch.Tensor | None:
    """bool [rows]: rows of `like` [batch, tokens, ..., features] that are not padding; None if every row counts."""
    mask = inputs.get("attention_mask")
    if mask is None or like.dim() < 3 or mask.shape != like.shape[:2]:
        return None
    between = like.shape[2:-1]
    return mask.bool()[(..., *[None] * len(between))].expand(*mask.shape, *between).reshape(-1)


def rows_of(tensor: torch.Tensor, valid: torch.Tensor | None) -> torch.Tensor:
    """[..., features] -> [rows, features], without padding rows."""
    flat = tensor.reshape(-1, tensor.shape[-1])
    return flat if valid is None else flat[valid]
