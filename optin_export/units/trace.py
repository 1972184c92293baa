"""Observe one forward pass: which modules run, how often, in which order, and the dependencies between them."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import nn

from optin_export.units.capture import capture, reset_caches
from optin_export.units.outputs import tensor_of

#: A node of autograd's graph; compared by identity.
Node = Any


@dataclass
class Pass:
    """The record of one forward pass. Modules are distinguished by identity, because a module may have several names.

    calls: how often each module ran. order: when it ran first. outputs: the node that made its (first) output, as it
    was when the module returned it; every: of all tensors that it returned. last: the node of the model's output.
    users: node -> [(node that reads it, as which argument)].
    """

    calls: dict[int, int] = field(default_factory=dict)
    order: dict[int, int] = field(default_factory=dict)
    outputs: dict[int, Node] = field(default_factory=dict)
    every: dict[int, list[Node]] = field(default_factory=dict)
    last: Node = None
    users: dict[Node, list[tuple[Node, int]]] = field(default_factory=dict)

    @cached_property
    def read(self) -> set[Node]:
        """All nodes from which the model's output is computed."""
        todo = [] if self.last is None else [self.last]
        found = set(todo)
        while todo:
            for following, _ in todo.pop().next_functions:
                if following is not None and following not in found:
                    found.add(following)
                    todo.append(following)
        return found

    def matters(self, module: nn.Module) -> bool:
        """Whether the model's output depends on what the module returned, according to autograd."""
        nodes = self.every.get(id(module), [])
        return self.last is None or not nodes or any(node in self.read for node in nodes)


def observe_pass(model: nn.Module, inputs: Mapping[str, torch.Tensor]) -> Pass:
    """Run the model once on `inputs`; its weights, gradients and hooks are not changed."""
    seen, ends = Pass(), []

    number = {path: id(module) for path, module in model.named_modules()}

    def before(path: str, args: Any, kwargs: Any) -> None:
        seen.order.setdefault(number[path], len(seen.order))
        seen.calls[number[path]] = seen.calls.get(number[path], 0) + 1

    def after(path: str, args: Any, output: Any) -> None:
        for index, tensor in enumerate(_tensors(output)):
            if tensor.grad_fn is not None:
                ends.append(tensor.grad_fn)
                seen.every.setdefault(number[path], []).append(tensor.grad_fn)
                if index == 0:
                    seen.outputs.setdefault(number[path], tensor.grad_fn)

    with capture(model, dict.fromkeys(number, before), dict.fromkeys(number, after)), _recorded(model):
        result = model(**inputs)
    reset_caches(model)
    with torch.no_grad():
        model(**inputs)  # values that modules keep from a pass must not hold its graph, or they could not be copied
    seen.last = tensor_of(result).grad_fn
    seen.users = _users(ends)
    return seen


def _users(ends: Sequence[Node]) -> dict[Node, list[tuple[Node, int]]]:
    users: dict[Node, list[tuple[Node, int]]] = {}
    todo, seen = list(ends), set(ends)
    while todo:
        node = todo.pop()
        for argument, (following, _) in enumerate(node.next_functions):
            if following is None:
                continue
            users.setdefault(following, []).append((node, argument))
            if following not in seen:
                seen.add(following)
                todo.append(following)
    return users


def _tensors(output: Any) -> list[torch.Tensor]:
    if isinstance(output, torch.Tensor):
        return [output]
    parts = output.values() if isinstance(output, Mapping) else output if isinstance(output, tuple | list) else ()
    return [tensor for part in parts for tensor in _tensors(part)]


@contextlib.contextmanager
def _recorded(model: nn.Module) -> Iterator[None]:
    """Make all weights require gradients in the body, because autograd records only operations that depend on them."""
    frozen = [parameter for parameter in model.parameters() if not parameter.requires_grad]
    for parameter in frozen:
        parameter.requires_grad_(parameter.is_floating_point())
    try:
        with torch.enable_grad():
            yield
    finally:
        for parameter in frozen:
            parameter.requires_grad_(False)
