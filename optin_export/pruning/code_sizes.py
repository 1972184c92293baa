"""Sizes that a module's code gives to tensor operations, such as `x.reshape(batch, tokens, width)`, follow the units.

They come from the width of an input, from attributes or from constants, and are those of all units. In the forward of a
module that lost units, some of them are replaced, call by call: `(reshape 2 3)` is entry 3 of the sizes of the third
call of `reshape` or `view`. Calls are counted whose values are computed from the module's arguments or parameters:
others, such as the distances of tokens, a module may compute in one pass and keep for the next. Sizes that do not count
units may be wrong as well, if the code computes them from both kinds; they stay `whole`. Its class keeps its name, and
its layers their paths.
"""

from __future__ import annotations

import functools
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from optin_export.units import tensors_in

#: The attribute with the sizes to replace: (function, number of its call) -> {position: size}.
REPLACED = "replaced_sizes"
Key = tuple[str, int]
_NAME = re.compile(r"\((expand|reshape|split|unflatten) (\d{1,6}) (\d{1,3})( whole)?\)")
#: Functions by their name, as methods or not -> the name in `Key`.
_FUNCTIONS = {"expand": "expand", "reshape": "reshape", "view": "reshape", "split": "split", "unflatten": "unflatten"}
#: Functions whose result has the values of their first argument, and of the others at most the shape or type; those
#: named `new_...` and `..._like` have values of none.
_SHAPED = {"expand_as", "reshape_as", "to", "type_as", "view_as"}
#: The attribute of a tensor with the run in which it was computed from the module's arguments or parameters.
_RUN = "_computed_in"


class SizedCall(NamedTuple):
    """A call of a function with sizes. dim: the dimension of the (first) result that its first size describes.

    run: calls the function with other sizes.
    """

    key: Key
    sizes: tuple[Any, ...]
    dim: int
    run: Callable[[tuple[Any, ...]], Any]

    def described(self, result: Any) -> list[tuple[torch.Tensor, int]]:
        """Per size, the result and its dimension that has this size."""
        if self.key[0] == "split":
            return [(one, self.dim) for one, _ in zip(result, self.sizes, strict=False)]
        return [(result, self.dim + position) for position in range(len(self.sizes))]


class SizedCalls(TorchFunctionMode):
    """Runs every call with sizes, in one run of a module, through `see`, whose result is that of the call.

    given: the arguments of the run.
    """

    def __init__(self, module: nn.Module, given: Any, see: Callable[[SizedCall], Any]) -> None:
        super().__init__()
        self.see, self.numbers, self.run = see, Counter[str](), object()
        # By identity, and held, so that none of them is another tensor later.
        self.given = {id(tensor): tensor for tensor in (*tensors_in(given), *module.parameters())}

    def __torch_function__(
        self, func: Any, types: Iterable[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        name, named = getattr(func, "__name__", ""), kwargs or {}
        counts = self._is_computed(name, args, named)
        call = self._call(_FUNCTIONS[name], func, args, named) if counts and name in _FUNCTIONS else None
        result = func(*args, **named) if call is None else self.see(call)
        if counts:
            for tensor in tensors_in(args[0] if name == "__setitem__" else result):
                setattr(tensor, _RUN, self.run)
        return result

    def _is_computed(self, name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
        """Whether the function's result is computed from the module's arguments or parameters."""
        if name.startswith("new_") or name.endswith("_like"):
            return False
        sources = args[:1] if name in _SHAPED else (args, kwargs)
        return any(getattr(one, _RUN, None) is self.run or id(one) in self.given for one in tensors_in(sources))

    def _call(self, name: str, func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> SizedCall | None:
        tensor, *rest = [*args, *kwargs.values()]
        if not isinstance(tensor, torch.Tensor) or not rest or isinstance(rest[0], torch.dtype):
            return None
        if not tensor.is_floating_point():  # indices
            return None
        key = name, self.numbers[name]
        self.numbers[name] += 1
        if name == "split":
            dim = int(rest[1]) if len(rest) > 1 else 0
            sizes = (rest[0],) if isinstance(rest[0], int) else tuple(rest[0])
            one = isinstance(rest[0], int)
            return SizedCall(key, sizes, dim, lambda new: torch.split(tensor, new[0] if one else list(new), dim))
        if name == "unflatten":
            dim = int(rest[0]) % tensor.dim()
            return SizedCall(key, tuple(rest[1]), dim, lambda new: torch.unflatten(tensor, dim, new))
        sizes = tuple(rest[0]) if isinstance(rest[0], list | tuple) else tuple(rest)
        # A view of a tensor that lost units may need a copy.
        return SizedCall(key, sizes, 0, tensor.expand if name == "expand" else tensor.reshape)


def size_name(path: str, key: Key, position: int, whole: bool = False) -> str:
    """The name of one size in the code of a module, among the size attributes of a group. whole: it counts no units."""
    return f"{path}.({key[0]} {key[1]} {position}{' whole' if whole else ''})".lstrip(".")


def is_code_size(attribute: str) -> bool:
    """Whether the name of a size attribute is that of a size in the code."""
    return _NAME.fullmatch(attribute.rpartition(".")[2]) is not None


def replace_size(model: nn.Module, attribute: str, per_unit: int, units: int) -> None:
    """Replace one size in the code of a module (see `size_name`), in place; 0 per unit leaves it open."""
    path, _, name = attribute.rpartition(".")
    found = _NAME.fullmatch(name)
    assert found is not None
    module: Any = model.get_submodule(path)
    if not hasattr(module, REPLACED):
        base: Any = type(module)
        module.__class__ = _following(base)
        setattr(module, REPLACED, {})
    sizes = getattr(module, REPLACED).setdefault((found[1], int(found[2])), {})
    sizes[int(found[3])] = per_unit if found[4] else per_unit * units or -1


@functools.cache
def _following(base: Any) -> Any:
    """The class with a forward that replaces sizes; copied and pickled by its base, as no module has it by name."""

    @functools.wraps(base.forward)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        replaced = getattr(self, REPLACED)

        def see(call: SizedCall) -> Any:
            new = replaced.get(call.key, {})
            return call.run(tuple(new.get(position, size) for position, size in enumerate(call.sizes)))

        with SizedCalls(self, (args, kwargs), see):
            return base.forward(self, *args, **kwargs)

    def reduce(self: Any, protocol: int) -> tuple[Any, ...]:
        return _instance, (base,), self.__getstate__()

    return type(base.__name__, (base,), {"__module__": base.__module__, "__reduce_ex__": reduce, "forward": forward})


def _instance(base: Any) -> Any:
    following = _following(base)
    return following.__new__(following)
