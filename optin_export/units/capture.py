"""Observe modules during forward passes; the only place that attaches hooks to modules and removes them."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from optin_export.units.outputs import Calls, calls_of, copied, map_tensors

#: Before a module runs: (its path, positional arguments, named arguments) -> other positional arguments, or None.
SeeInputs = Callable[[str, tuple[Any, ...], dict[str, Any]], tuple[Any, ...] | None]
#: After it ran: (its path, positional arguments, its output) -> another output, or None.
SeeOutput = Callable[[str, tuple[Any, ...], Any], Any]
#: A place to observe: a module's path, and the index of its positional argument, its "output", or its whole "call"
#: (positional and named arguments).
Point = tuple[str, Any]


class _Stop(Exception):
    """Ends a forward pass once the module of interest has run."""


@contextlib.contextmanager
def capture(
    model: nn.Module,
    inputs: Mapping[str, SeeInputs] | None = None,
    outputs: Mapping[str, SeeOutput] | None = None,
    stop: str | None = None,
    calls: int = 1,
) -> Iterator[None]:
    """Observe, and change, what modules read and return while the body runs the model.

    Args:
        model: the module that the paths belong to; "" is the model itself.
        inputs: path -> function that is called before the module runs; its result replaces the arguments.
        outputs: path -> function that is called with the module's output; its result replaces the output.
        stop: the module after which the body ends, as if it were complete; later layers do not run.
        calls: number of calls of `stop` after which the body ends.
    """
    left = calls

    def stops(module: nn.Module, args: Any, output: Any) -> None:
        nonlocal left
        left -= 1
        if left == 0:
            raise _Stop

    with contextlib.ExitStack() as stack:
        if stop is not None:
            stack.enter_context(contextlib.suppress(_Stop))
        for path, before in (inputs or {}).items():
            hook = _input_hook(path, before)
            handle = model.get_submodule(path).register_forward_pre_hook(hook, with_kwargs=True)
            stack.callback(handle.remove)
        for path, after in (outputs or {}).items():
            stack.callback(model.get_submodule(path).register_forward_hook(_output_hook(path, after)).remove)
        if stop is not None:  # last, so that functions that observe this module's output run before it
            stack.callback(model.get_submodule(stop).register_forward_hook(stops).remove)
        yield


def _input_hook(path: str, see: SeeInputs) -> Callable[..., Any]:
    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        changed = see(path, args, kwargs)
        return None if changed is None else (changed, kwargs)

    return hook


def _output_hook(path: str, see: SeeOutput) -> Callable[..., Any]:
    return lambda module, args, output: see(path, args, output)


def attach(module: nn.Module, hook: Callable[..., Any]) -> None:
    """Let `hook(module, args, output)` permanently replace the module's output; it is copied with the model."""
    module.register_forward_hook(hook)


def attach_before(module: nn.Module, hook: Callable[..., Any]) -> None:
    """Let `hook(module, args, kwargs)` permanently replace the module's arguments; it is copied with the model."""
    module.register_forward_pre_hook(hook, with_kwargs=True)


def reset_caches(model: nn.Module) -> None:
    """Let modules forget tensors that they keep between passes, as timm's do when they are switched to training."""
    for module in model.modules():
        if type(module).train is not nn.Module.train and not module.training:
            module.train()
            module.eval()


@contextlib.contextmanager
def captured(
    model: nn.Module,
    points: Sequence[Point],
    keep: Callable[[Any], Any] = copied,
    stop: str | None = None,
    calls: int = 1,
) -> Iterator[dict[Point, list[Any]]]:
    """The values at these points in the forward passes of the body, call by call, in the order of the first calls.

    keep: value -> the part to keep; default: copies of its tensors. stop, calls: as for `capture`.
    """
    values: dict[Point, list[Any]] = {}
    wanted: dict[str, list[Any]] = {}
    for path, what in dict.fromkeys(points):
        wanted.setdefault(path, []).append(what)

    def before(path: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        for what in wanted[path]:
            if what != "output":
                values.setdefault((path, what), []).append(keep((args, kwargs) if what == "call" else args[what]))

    def after(path: str, args: tuple[Any, ...], output: Any) -> None:
        values.setdefault((path, "output"), []).append(keep(output))

    inputs = {path: before for path, whats in wanted.items() if any(what != "output" for what in whats)}
    outputs = {path: after for path, whats in wanted.items() if "output" in whats}
    with capture(model, inputs, outputs, stop, calls):
        yield values


@contextlib.contextmanager
def block_outputs(model: nn.Module, blocks: Sequence[str], rewritten: Collection[str] = ()) -> Iterator[dict[str, Any]]:
    """Collect each block's output (as returned, tensor or containers of them) during the forward passes of the body.

    rewritten: blocks whose output the model overwrites in place; they are copied. For a block that runs several times
    in a pass, the last output is kept.
    """
    found: dict[str, Any] = {}

    def after(path: str, args: Any, output: Any) -> None:
        # Models may change their lists and dictionaries, but not tensors, except for those that they overwrite. Modules
        # after a block that is a single layer may always work in place.
        copies = path in rewritten or isinstance(model.get_submodule(path), nn.Conv1d | nn.Conv2d)
        found[path] = copied(output) if copies else map_tensors(output, lambda _, tensor: tensor)

    with capture(model, outputs=dict.fromkeys(blocks, after)):
        yield found


@contextlib.contextmanager
def layer_inputs(model: nn.Module, paths: Sequence[str]) -> Iterator[dict[str, Any]]:
    """The inputs of these layers in the last forward pass of the body.

    A tensor, or `Calls` for a layer that runs several times; layers that do not run are left out.
    """
    found: dict[str, Any] = {}

    def before(path: str, args: tuple[torch.Tensor, ...], kwargs: Any) -> None:
        # A copy: the model may overwrite it in place, for example a residual stream.
        inputs = args[0].clone()
        found[path] = Calls([*calls_of(found[path]), inputs]) if path in found else inputs

    def begins(path: str, args: Any, kwargs: Any) -> None:
        found.clear()  # another pass, another batch

    with capture(model, {"": begins, **dict.fromkeys(paths, before)}):
        yield found


@contextlib.contextmanager
def layer_outputs(
    model: nn.Module, paths: Sequence[str], rewritten: Collection[str] = ()
) -> Iterator[dict[str, list[torch.Tensor]]]:
    """Collect the outputs of these layers, in the autograd graph, call by call.

    rewritten: layers whose output the model overwrites in place, in addition to those before in-place activations.
    """
    found: dict[str, list[torch.Tensor]] = {}
    # A module that works in place would overwrite the recorded tensor, so it gets a copy.
    in_place = any(getattr(module, "inplace", False) for module in model.modules())

    def after(path: str, args: object, output: torch.Tensor) -> torch.Tensor:
        found.setdefault(path, []).append(output)
        return output.clone() if in_place or path in rewritten else output

    with capture(model, outputs=dict.fromkeys(paths, after)):
        yield found
