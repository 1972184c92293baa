"""Replace weights that are computed before use, such as weight_norm, by plain parameters with their value.

In eval mode such a weight is a constant. Units of a layer can only be removed from the weight itself: g and v of a
weight norm would have to be cut together, and a spectral norm would change with every removed row.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import nn
from torch.nn.utils import parametrize, prune, remove_spectral_norm, remove_weight_norm
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from optin_export.errors import InputError

#: Old-style hooks of torch -> (the name of the tensor they compute, what makes it a plain parameter).
_HOOKS: tuple[tuple[type, str, Callable[[nn.Module, str], Any]], ...] = (
    (WeightNorm, "name", remove_weight_norm),
    (SpectralNorm, "name", remove_spectral_norm),
    (prune.BasePruningMethod, "_tensor_name", prune.remove),
)


def fold_weights(module: nn.Module) -> list[str]:
    """Replace, in place, every computed weight of `module` by its value in eval mode; returns their names.

    Known are torch.nn.utils.parametrize, the hooks of torch.nn.utils (weight_norm, spectral_norm, prune), other hooks
    that set a weight before the forward pass, and timm's standardised convolutions. The module is in eval mode after.
    Raises InputError, which names the weight, where its value is not a constant.
    """
    module.eval()
    places = list(_computed(module))
    if any(getattr(part, "dtype", torch.float32).itemsize < 4 for part in _tensors(places)):
        module.float()  # a norm in half precision would be rounded once more
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch says that the old hooks are deprecated
        folded = _fold_parametrized(module)
        folded += _fold_hooks(module)
        folded += _fold_unknown_hooks(module)
        folded += _fold_standardised(module)
    return folded


def folded_state(state: Mapping[str, torch.Tensor], own: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A state dict with the weights that `own` (a model's state dict) has, where `state` has what they are computed of.

    Masks of torch.nn.utils.prune are multiplied in, weight norms of either form computed or renamed.
    """
    result = dict(state)
    for name in own:
        base, _, leaf = name.rpartition(".parametrizations.")
        if leaf.endswith((".original0", ".original1")):
            old = f"{base}.{leaf[:-10]}_{'g' if leaf.endswith('0') else 'v'}".removeprefix(".")
            if name not in result and old in result:
                result[name] = result.pop(old)
        if name in result:
            continue
        if f"{name}_orig" in result and f"{name}_mask" in result:
            result[name] = result.pop(f"{name}_orig") * result.pop(f"{name}_mask")
            continue
        path, _, leaf = name.rpartition(".")
        new = f"{path}.parametrizations.{leaf}.original".removeprefix(".")
        for norm, direction in ((f"{name}_g", f"{name}_v"), (f"{new}0", f"{new}1")):
            if norm in result and direction in result and norm not in own:
                value = _normed(result[norm], result[direction])
                if value is not None:
                    del result[norm], result[direction]
                    result[name] = value
                    break
    return result


def _normed(norm: torch.Tensor, direction: torch.Tensor) -> torch.Tensor | None:
    """The weight of a weight norm: `direction` scaled to `norm` along every dim but one; None if that is unclear."""
    dims = [dim for dim, size in enumerate(norm.shape) if size != 1]
    if norm.dim() not in (0, direction.dim()) or len(dims) > 1:
        return None
    if norm.dim() and dims and norm.shape[dims[0]] != direction.shape[dims[0]]:
        return None
    dim = dims[0] if dims else -1 if not norm.dim() else 0
    # One number for a tensor of several rows is a norm over all of them.
    if norm.dim() and not dims and direction.shape[0] != 1:
        return None
    return torch._weight_norm(direction.float(), norm.float(), dim)


def _tensors(places: list[nn.Module]) -> Iterator[torch.Tensor]:
    for part in places:
        yield from part.parameters()


def _computed(module: nn.Module) -> Iterator[nn.Module]:
    """Modules with a weight that is computed, as far as that shows without running anything."""
    for part in module.modules():
        if parametrize.is_parametrized(part) or part._forward_pre_hooks:
            yield part


def _refuse(path: str, name: str, why: str) -> InputError:
    return InputError(
        f"the weight '{path}.{name}' cannot be made a plain parameter".replace("'.", "'"),
        why,
        "return a model whose weights are plain parameters, for instance after remove_parametrizations",
    )


def _fold_parametrized(module: nn.Module) -> list[str]:
    found: list[tuple[str, Any, str, torch.Tensor, tuple[int, ...]]] = []
    for path, part in module.named_modules():
        if not parametrize.is_parametrized(part):
            continue
        for name in list(part.parametrizations):
            try:
                value, again = (getattr(part, name).detach().clone() for _ in range(2))
            except Exception as error:  # a parametrisation is code of the user's
                raise _refuse(path, name, f"computing it failed: {type(error).__name__}: {error}"[:300]) from error
            if not torch.equal(value, again):
                raise _refuse(path, name, "its parametrisation gives another value every time, in eval mode as well")
            inner: Any = part.parametrizations[name]
            originals = tuple(id(tensor) for tensor in (*inner.parameters(), *inner.buffers()))
            found.append((path, part, name, value, originals))
    shared: dict[tuple[int, ...], nn.Parameter] = {}
    for _, part, name, value, originals in found:
        trained = any(True for _ in part.parametrizations[name].parameters())
        part._parameters.pop(name, None)
        if trained:
            known = shared.get(originals)
            # Weights that were tied stay tied.
            tied = known is not None and torch.equal(known, value)
            part._parameters[name] = known if tied else shared.setdefault(originals, nn.Parameter(value))
        else:
            part._buffers[name] = value
    for part in {id(part): part for _, part, _, _, _ in found}.values():
        # Not remove_parametrizations: it takes the property from a class that copies of the layer share.
        del part._modules["parametrizations"]
        part.__class__ = type(part).__bases__[0]
    return [f"{path}.{name}".removeprefix(".") for path, _, name, _, _ in found]


def _fold_hooks(module: nn.Module) -> list[str]:
    folded = []
    for path, part in module.named_modules():
        for hook in list(part._forward_pre_hooks.values()):
            for kind, attribute, remove in _HOOKS:
                if isinstance(hook, kind):
                    name = str(getattr(hook, attribute))
                    # What torch leaves is a constant of the eval mode: no power iteration of a spectral norm.
                    remove(part, name)
                    folded.append(f"{path}.{name}".removeprefix("."))
    return folded


def _fold_unknown_hooks(module: nn.Module) -> list[str]:
    """Fold user hooks that set a weight: run them twice without inputs, and keep hooks that set none."""
    folded = []
    for path, part in module.named_modules():
        plain = {name for name, value in vars(part).items() if _is_weight(part, name, value)}
        for key, hook in list(part._forward_pre_hooks.items()):
            if not plain and not part._parameters:
                continue
            takes_kwargs = key in part._forward_pre_hooks_with_kwargs
            before = {name: value.detach().clone() for name, value in part._parameters.items() if value is not None}
            values = []
            for _ in range(2):
                values.append(_run(part, hook, takes_kwargs, before))
            first, second = values
            if first is None or second is None:  # it reads its inputs
                if plain and not _is_of_a_library(hook):
                    why = "a forward pre-hook computes it out of the module's inputs: it is another one for every input"
                    raise _refuse(path, min(plain), f"{why} ({_name(hook)})")
                continue
            changed = [name for name in first if name not in before or not torch.equal(first[name], before[name])]
            for name in changed:
                if name not in second or not torch.allclose(first[name], second[name], rtol=1e-5, atol=1e-7):
                    raise _refuse(path, name, f"a forward pre-hook changes it at every call ({_name(hook)})")
                vars(part).pop(name, None)
                part._parameters[name] = nn.Parameter(first[name])
                folded.append(f"{path}.{name}".removeprefix("."))
            if changed:
                del part._forward_pre_hooks[key]
                part._forward_pre_hooks_with_kwargs.pop(key, None)
    return folded


def _run(
    part: nn.Module, hook: Callable[..., Any], takes_kwargs: bool, before: dict[str, torch.Tensor]
) -> dict[str, torch.Tensor] | None:
    """The weights after a hook without inputs; None if it fails or needs inputs, with the parameters restored."""
    try:
        given = hook(part, (), {}) if takes_kwargs else hook(part, ())
    except Exception:  # it reads missing inputs
        given = ()
    if given is not None:
        for name, value in before.items():
            part._parameters[name].copy_(value)  # type: ignore[union-attr]
        return None
    found = {name: value.detach().clone() for name, value in part._parameters.items() if value is not None}
    return found | {name: value.detach().clone() for name, value in vars(part).items() if _is_weight(part, name, value)}


def _is_weight(part: nn.Module, name: str, value: Any) -> bool:
    """Whether an attribute is a plain tensor instead of the class's parameter, which means that it is computed."""
    return isinstance(value, torch.Tensor) and not name.startswith("_") and name in ("weight", "bias", *_sized(part))


def _sized(part: nn.Module) -> tuple[str, ...]:
    """Other tensors that torch's own layers compute with."""
    return ("in_proj_weight", "in_proj_bias") if isinstance(part, nn.MultiheadAttention) else ()


def _is_of_a_library(hook: Any) -> bool:
    return getattr(hook, "__module__", "").partition(".")[0] in ("accelerate", "transformers", "optin_export")


def _name(hook: Any) -> str:
    return str(getattr(hook, "__qualname__", type(hook).__qualname__))[:80]


def _fold_standardised(module: nn.Module) -> list[str]:
    """timm's convolutions that standardise their filters: mean and variance of a filter go with its input channels."""
    folded = []
    for path, part in module.named_modules():
        if type(part).__module__ != "timm.layers.std_conv" or not isinstance(part, nn.Conv2d):
            continue
        from timm.layers import Conv2dSame, ScaledStdConv2d, ScaledStdConv2dSame, StdConv2dSame

        layer: Any = part
        scaled = isinstance(part, ScaledStdConv2d | ScaledStdConv2dSame)
        rows = part.weight.reshape(1, part.out_channels, -1)
        factor = (layer.gain * layer.scale).view(-1) if scaled else None
        value = nn.functional.batch_norm(rows, None, None, weight=factor, training=True, momentum=0.0, eps=layer.eps)
        layer.weight = nn.Parameter(value.reshape_as(part.weight))
        if scaled:
            del layer.gain
        layer.__class__ = Conv2dSame if getattr(layer, "same_pad", isinstance(part, StdConv2dSame)) else nn.Conv2d
        folded.append(f"{path}.weight".removeprefix("."))
    return folded
