"""Modules whose code reshapes to the width of their input, such as `B, N, C = x.shape; ... .reshape(B, N, C)`.

Without some heads the width inside is smaller than that of the input, so this code no longer fits. The module's forward
is traced (torch.fx) with its own layers as they are, the read of the width is replaced by a number, and the traced code
becomes the forward of a subclass. All layers, parameters and their names stay.
"""

from __future__ import annotations

import inspect
import operator
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import fx, nn

from optin_export.errors import InputError
from optin_export.models import Inputs
from optin_export.units import UnitGroup, captured

#: The name of this "attribute" among the sizes of a group.
INPUT_WIDTH = "(input width)"
Call = tuple[tuple[Any, ...], dict[str, Any]]


def calls_of_modules(model: nn.Module, groups: Sequence[UnitGroup], inputs: Inputs) -> dict[str, Call]:
    """What the modules are called with whose input width is a size of a group: path -> (arguments, named arguments)."""
    paths = [name.rpartition(".")[0] for group in groups for name, _ in group.sizes if name.endswith(INPUT_WIDTH)]
    if not paths:
        return {}
    with torch.no_grad(), captured(model, [(path, "call") for path in paths]) as seen:
        model(**inputs)
    return {path: calls[0] for (path, _), calls in seen.items()}


def set_input_width(model: nn.Module, path: str, call: Call, before: int, width: int) -> None:
    """Let the module compute with `width` wherever it reads the width of an input, which is `before`.

    Raises InputError if its code cannot be traced, or reads no such width.
    """
    module = model.get_submodule(path)
    graph, names = _trace(module, path, call)
    bound = inspect.signature(type(module).forward).bind(module, *call[0], **call[1]).arguments
    found = False
    for node in list(graph.nodes):
        size = _size_read(node, bound, names)
        if size is None or size[1] != before:
            continue
        tensor, _, dim = size
        if dim == tensor.dim() - 1 or (dim == 1 and tensor.dim() == 4):
            node.replace_all_uses_with(width)
            graph.erase_node(node)
            found = True
    if not found:
        raise InputError(f"'{path}' cannot be cut", "its code does not read the width of its input", "leave it whole")
    traced = fx.GraphModule(module, graph)
    kind = type(module)
    module.__class__ = type(kind.__name__, (kind,), {"forward": type(traced).forward, "__module__": kind.__module__})


class _Tracer(fx.Tracer):
    def is_leaf_module(self, module: nn.Module, name: str) -> bool:
        return True


def _trace(module: nn.Module, path: str, call: Call) -> tuple[fx.Graph, dict[str, str]]:
    """The graph of a module's forward for such a call, and its placeholders: name in the graph -> argument."""
    signature = inspect.signature(type(module).forward)
    bound = signature.bind(module, *call[0], **call[1])
    bound.apply_defaults()
    fixed = {
        name: value
        for name, value in list(bound.arguments.items())[1:]
        if value is None or isinstance(value, bool | int | float | str)
    }
    try:
        graph = _Tracer().trace(module, concrete_args=fixed)
    except Exception as error:  # the module's own code, on values that are not tensors
        raise InputError(
            f"'{path}' cannot be cut", f"its code cannot be traced: {error}"[:200], "leave it whole"
        ) from None
    names: dict[str, str] = {}
    arguments = [name for name, one in signature.parameters.items() if name != "self"]
    for node in list(graph.nodes):
        if node.op == "placeholder":
            plain = str(node.target).lstrip("*")
            name = next((one for one in arguments if plain == one or plain.startswith(f"{one}_")), plain)
            if plain != name:  # torch.fx numbers the arguments that it fixes
                node.target = name
                node._rename(name)
            names[node.name] = name
        elif node.op == "call_function" and "assert" in getattr(node.target, "__name__", "") and not node.users:
            graph.erase_node(node)
    return graph, names


def _size_read(
    node: fx.Node, bound: Mapping[str, Any], names: Mapping[str, str]
) -> tuple[torch.Tensor, int, int] | None:
    """(input tensor, its size, the dimension) if the node reads one size of an input of the module."""
    source: Any
    shape: Any
    dim: Any
    if node.op == "call_method" and node.target == "size" and len(node.args) == 2:
        source, dim = node.args
    elif node.op == "call_function" and node.target is operator.getitem and isinstance(node.args[0], fx.Node):
        shape, dim = node.args
        is_shape = (shape.op == "call_function" and shape.target is getattr and shape.args[1] == "shape") or (
            shape.op == "call_method" and shape.target == "size" and len(shape.args) == 1
        )
        if not is_shape:
            return None
        source = shape.args[0]
    else:
        return None
    if not isinstance(source, fx.Node) or source.op != "placeholder" or not isinstance(dim, int):
        return None
    tensor = bound.get(names.get(source.name, ""))
    if not isinstance(tensor, torch.Tensor) or not -tensor.dim() <= dim < tensor.dim():
        return None
    return tensor, tensor.shape[dim], dim % tensor.dim()
