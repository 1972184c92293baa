"""What distinguishes a pruned module from the one that its library builds, as data for `runtime.shrink`."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn

from optin_export.formats.runtime import HOOKS
from optin_export.models.equivalents import MultiheadAttention, NarrowAttention, NarrowSelfAttention, SelfAttention
from optin_export.pruning.code_sizes import REPLACED, size_name
from optin_export.pruning.rebuild import Constant, Passthrough

#: Modules that replace those of a library, by name: made of the module that they replace.
EQUIVALENTS: dict[str, Any] = {
    one.__name__: one for one in (MultiheadAttention, NarrowAttention, NarrowSelfAttention, SelfAttention)
}
#: Attributes that change nothing that a pruned module computes.
_FREE = ("training", "use_cache")


class Unlike(Exception):
    """A pruned module that its library's own module cannot become; says why, as a part of a sentence."""


class Changes:
    """data: JSON-serialisable, see `runtime.shrink`. transposed: weights that the library stores transposed."""

    def __init__(self, original: nn.Module, pruned: nn.Module) -> None:
        self.data: dict[str, Any] = {}
        self.transposed: list[str] = []
        self._shared = getattr(pruned, "config", None)
        self._compare("", original, pruned)

    @property
    def replaced(self) -> set[str]:
        """Names of `EQUIVALENTS` in it."""
        return set(self.data.get("replaced", {}).values())

    def state(self, pruned: nn.Module) -> dict[str, torch.Tensor]:
        """The weights of the pruned module under the names and in the layout of its library."""
        state = pruned.state_dict()
        return {name: tensor.T if name in self.transposed else tensor for name, tensor in state.items()}

    def _add(self, kind: str, name: str, value: Any) -> None:
        self.data.setdefault(kind, {})[name] = value

    def _compare(self, path: str, original: Any, pruned: Any) -> None:
        """Raises Unlike."""
        if isinstance(pruned, Constant):
            self._add("constants", path, [len(pruned.bias), pruned.returns_tuple, pruned.expands])
        elif isinstance(pruned, Passthrough):
            self._add("passthroughs", path, pruned.returns_tuple)
        elif pruned is None:
            self.data.setdefault("removed", []).append(path)
        elif type(original).__name__ == "Conv1D" and isinstance(pruned, nn.Linear):
            self._compare_transposed(path, original, pruned)
        elif original is not None and type(original) is not type(pruned) and type(pruned) in EQUIVALENTS.values():
            self._add("replaced", path, type(pruned).__name__)
            self._compare(path, type(pruned)(original), pruned)
        elif not _is_like(original, pruned):
            was = "nothing" if original is None else f"a {type(original).__name__}"
            raise Unlike(f"the layer '{path}' was {was}, and is a {type(pruned).__name__} that replaces it")
        else:
            self._compare_tensors(path, original, pruned)
            self._compare_attributes(path, vars(original), vars(pruned))
            self._compare_code(path, pruned)
            self._compare_hooks(path, original, pruned)
            for name in dict.fromkeys([*original._modules, *pruned._modules]):
                before, after = original._modules.get(name), pruned._modules.get(name)
                if before is not None or after is not None:
                    self._compare(_joined(path, name), before, after)

    def _compare_transposed(self, path: str, original: Any, pruned: nn.Linear) -> None:
        """transformers' Conv1D, which the package reads as a linear layer."""
        self.transposed.append(f"{path}.weight")
        for name, value in (("nf", pruned.out_features), ("nx", pruned.in_features)):
            if getattr(original, name, value) != value:
                self._add("attributes", f"{path}.{name}", value)
        for name, tensor in (("weight", pruned.weight.T), ("bias", pruned.bias)):
            if tensor.shape != getattr(original, name).shape:
                self._add("shapes", f"{path}.{name}", list(tensor.shape))

    def _compare_tensors(self, path: str, original: nn.Module, pruned: nn.Module) -> None:
        for tensors, before in ((pruned._parameters, original._parameters), (pruned._buffers, original._buffers)):
            for name in dict.fromkeys([*before, *tensors]):
                old, new = before.get(name), tensors.get(name)
                where = _joined(path, name)
                if new is None and old is not None:
                    self.data.setdefault("removed", []).append(where)
                elif new is not None and old is None and name not in before:
                    if new.dtype != torch.int64 or new.dim() != 1 or tensors is pruned._parameters:
                        raise Unlike(f"the layer '{path}' has a tensor '{name}' that its library does not know")
                    self._add("buffers", where, len(new))
                elif new is not None and (old is None or old.shape != new.shape):
                    if name in pruned._non_persistent_buffers_set:
                        raise Unlike(
                            f"the buffer '{where}' lost entries, but its library recomputes all of them on loading"
                        )
                    self._add("shapes", where, list(new.shape))

    def _compare_attributes(self, path: str, original: Mapping[str, Any], pruned: Mapping[str, Any]) -> None:
        for name, new in pruned.items():
            old = original.get(name)
            if name.startswith("_") or name in _FREE or name not in original or new is self._shared:
                continue
            if type(new) is int and type(old) is int:
                if old != new:
                    self._add("attributes", _joined(path, name), new)
            elif isinstance(new, tuple | list) and isinstance(old, tuple | list) and len(old) == len(new):
                for at, (one, other) in enumerate(zip(old, new, strict=True)):
                    if type(one) is int and type(other) is int and one != other:
                        self._add("attributes", f"{_joined(path, name)}.{at}", other)
            elif type(new).__name__.endswith("Config") and type(new) is type(old):
                self._compare_attributes(_joined(path, name), vars(old), vars(new))

    def _compare_code(self, path: str, pruned: nn.Module) -> None:
        for key, sizes in getattr(pruned, REPLACED, {}).items():
            for position, size in sizes.items():
                self._add("code", size_name(path, key, position, whole=True), size)

    def _compare_hooks(self, path: str, original: nn.Module, pruned: nn.Module) -> None:
        known = {name for name, _ in _hooks(original)}
        for name, options in _hooks(pruned):
            if name in HOOKS:
                self.data.setdefault("hooks", []).append([path, name, options])
            elif name not in known and name != "_forget":  # which only empties caches
                raise Unlike(f"the layer '{path}' needs the function {name}, which its library does not call")


def _hooks(module: nn.Module) -> Iterator[tuple[str, dict[str, Any]]]:
    for hook in (*module._forward_pre_hooks.values(), *module._forward_hooks.values()):
        function: Any = hook.func if isinstance(hook, functools.partial) else hook
        options = dict(hook.keywords) if isinstance(hook, functools.partial) else {}
        yield getattr(function, "__name__", type(function).__name__), options


def _is_like(original: Any, pruned: Any) -> bool:
    """Whether both are of one class; a module whose code has other sizes is of a subclass (`code_sizes`)."""
    if type(original) is type(pruned):
        return True
    return hasattr(pruned, REPLACED) and type(pruned).__mro__[1] is type(original)


def _joined(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name
