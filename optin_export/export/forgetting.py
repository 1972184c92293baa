"""Free the memory that torch keeps for every exported program until the process ends."""

from __future__ import annotations

from typing import Any


def forget_shapes(program: Any) -> None:
    """Free what torch has recorded about the symbolic sizes of an exported program, once the program is written.

    The exporter's ShapeEnv holds several hundred recorded operators and examples of the inputs (`tracked_fakes`). Those
    refer back to it from C++, where the garbage collector cannot see the cycle, and caches of the class hold it too.
    Nothing is lost: every export has a separate ShapeEnv.
    """
    from torch._subclasses.fake_tensor import FakeTensor
    from torch.fx.experimental.symbolic_shapes import ShapeEnv

    values = [node.meta.get("val") for node in program.graph.nodes] if program is not None else []
    known = {id(value.fake_mode): value.fake_mode.shape_env for value in values if isinstance(value, FakeTensor)}
    for shapes in known.values():
        if shapes is not None and getattr(shapes, "tracked_fakes", None):
            shapes.tracked_fakes = None
    for method in vars(ShapeEnv).values():
        clear = getattr(method, "cache_clear", None)
        if callable(clear):
            clear()
