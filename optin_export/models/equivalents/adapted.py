"""Other methods for a module of a library: its class keeps its name, and its layers their paths."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from torch import nn

_Members = Callable[[Any], dict[str, Any]]


def adapt(module: nn.Module, members: _Members) -> None:
    """Give a module other methods, in place; members: class -> methods by name."""
    base: Any = type(module)
    if not hasattr(base, "_adapted_from"):
        module.__class__ = _subclass(base, members)


@functools.cache
def _subclass(base: Any, members: _Members) -> Any:
    """The class with other members; copied and pickled by its base, because no module has it by name."""

    def reduce(self: Any, protocol: int) -> tuple[Any, ...]:
        return _instance, (base, members), self.__getstate__()

    own = {"__module__": base.__module__, "__reduce_ex__": reduce, "_adapted_from": base}
    return type(base.__name__, (base,), {**members(base), **own})


def _instance(base: Any, members: _Members) -> Any:
    adapted = _subclass(base, members)
    return adapted.__new__(adapted)
