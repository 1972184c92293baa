"""Other methods for a module of a library: its class keeps its name, and its layers their paths."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from torch import nn

_Members = Callable[[Any], dict[str, Any]]


def adapt(module: nn.Module, members: _Members, *parents: Any) -> None:
    """Give a module other methods, in place.

    members: class -> methods by name. parents: classes between the module's class and those that it inherits from.
    """
    base: Any = type(module)
    if not hasattr(base, "_adapted_from"):
        module.__class__ = _subclass(base, members, *parents)


@functools.cache
def _subclass(base: Any, members: _Members, *parents: Any) -> Any:
    """The class with other members; copied and pickled by its base, because no module has it by name."""

    def reduce(self: Any, protocol: int) -> tuple[Any, ...]:
        return _instance, (base, members, *parents), self.__getstate__()

    own = {"__module__": base.__module__, "__reduce_ex__": reduce, "_adapted_from": base}
    return type(base.__name__, (base, *parents), {**members(base), **own})


def _instance(*args: Any) -> Any:
    adapted = _subclass(*args)
    return adapted.__new__(adapted)
