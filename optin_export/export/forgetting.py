"""What torch keeps of an export for as long as the process lives, and nobody asks for again."""

from __future__ import annotations

from typing import Any


def forget_shapes(program: Any) -> None:
    """Let go of what torch has found out about the symbolic sizes of an exported program, once that is written.

    Its notes of some hundred operators hang on the object that knows the sizes. That holds examples of the inputs,
    which hold it in turn by C++, where no garbage collector sees it; and caches of its class hold it as well. Another
    export has sizes of its own and finds none of this.
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
