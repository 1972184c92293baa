"""Build a model from its configuration without loading weights, and compare its names and shapes with its checkpoint.

Parameters take no memory: they are on the meta device while a module is built, and afterwards zeros in memory that is
mapped but not written. Buffers are computed normally, so the model runs and all but the weights' values can be checked.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from optin_export.errors import InputError

#: Parameters above which a forward pass is traced with fake tensors (shapes only). Above the first number it is always
#: traced; above the second it is computed if tracing fails. Tracing a small model takes longer than computing it.
MOST_COMPUTED, LEAST_TRACED = 200_000_000, 20_000_000
_MARK = "_optin_export_without_memory"


@dataclass
class Lookup:
    """Requests that a model is looked up rather than loaded.

    not_checked: what could not be checked, one line each. model: the task model, once it is known.
    """

    not_checked: list[str] = field(default_factory=list)
    model: nn.Module | None = None

    def note(self, text: str) -> None:
        if text not in self.not_checked:
            self.not_checked.append(text)


def built(make: Callable[[], nn.Module], lookup: Lookup | None) -> nn.Module:
    """The module that `make` builds; with a `lookup`, without memory for its parameters.

    A constructor that computes with its parameters cannot run without them: it then runs normally, with random weights.
    """
    if lookup is None:
        return make()
    try:
        with _without_memory():
            module = make()
        _fill(module)
        whole = isinstance(module, nn.Module) and not any(value.is_meta for value in _tensors(module))
    except Exception:  # the values are missing, or the constructor always fails: then it raises again below
        whole = False
    return module if whole else make()


def from_pretrained(
    auto: Any, name: str, config: Any, lookup: Lookup, **options: Any
) -> tuple[nn.Module, dict[str, Any]]:
    """As transformers' `from_pretrained` with `output_loading_info`: the module without weights, and missing weights.

    Raises what transformers raises: for a folder without weights, or weights of other shapes.
    """
    from transformers.utils.import_utils import is_accelerate_available

    # Without accelerate, transformers accepts no device_map: then the weights are loaded and dropped again.
    place = {"device_map": "meta"} if is_accelerate_available() else {}
    try:
        with _without_bar():
            _, info = auto.from_pretrained(name, config=config, output_loading_info=True, **place, **options)
    except OSError as error:
        if not needs_download(error):
            raise
        lookup.note(f"whether the weights fit: {not_cached(f'the checkpoint of hf:{name}')}")
        info = {}
    options.pop("dtype", None)
    return built(lambda: auto.from_config(config, dtype=torch.float32, **options), lookup), info


def built_timm(name: str, make: Callable[[bool], nn.Module], pretrained: bool, lookup: Lookup | None) -> nn.Module:
    """A timm model by name, made by `make(pretrained)`; in a lookup its cached weights, if any, are compared."""
    import timm

    if lookup is None or not pretrained:
        return built(lambda: make(pretrained), lookup)
    config = timm.get_pretrained_cfg(name) if timm.is_model(name) else None
    if config is None or config.hf_hub_id:  # others come from an address without a cache
        try:
            return built(lambda: make(True), lookup)
        except InputError as error:
            if not needs_download(error):
                raise
    lookup.note(f"whether the weights fit: {not_cached(f'the checkpoint of timm:{name}')}")
    return built(lambda: make(False), lookup)


def read_shapes(path: Path) -> dict[str, torch.Tensor]:
    """Zeros with the shapes in a safetensors file, which take no memory; raises what safetensors raises."""
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
    kinds = {"F64": torch.float32, "F32": torch.float32, "F16": torch.float32, "BF16": torch.float32}
    return {
        name: _zeros(torch.Size(one.get_shape()), kinds.get(one.get_dtype(), torch.int64))
        for name, one in slices.items()
    }


@contextlib.contextmanager
def unchanged(module: nn.Module) -> Iterator[None]:
    """A context after which all assignments to the module's parameters and buffers are reverted."""
    before = [(part, dict(part._parameters), dict(part._buffers)) for part in module.modules()]
    try:
        yield
    finally:
        for part, parameters, buffers in before:
            part._parameters.update(parameters)
            part._buffers.update(buffers)


@contextlib.contextmanager
def traced(model: nn.Module, first: bool = False) -> Iterator[bool]:
    """A context in which a forward pass of a large model without weights computes only shapes.

    first: trace medium-sized models as well, which could be computed. Yields whether forward passes are traced. A
    forward pass that depends on values cannot be traced: it raises.
    """
    most = LEAST_TRACED if first else MOST_COMPUTED
    if sum(parameter.numel() for parameter in model.parameters()) <= most:
        yield False
        return
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode(allow_non_fake_inputs=True):
        yield True


def untraced() -> AbstractContextManager[Any]:
    """A context in which tensors have values, also inside `traced`."""
    from torch.utils._python_dispatch import _disable_current_modes

    return _disable_current_modes()


@contextlib.contextmanager
def no_downloads() -> Iterator[None]:
    """A context in which the hub's libraries read only their local cache."""
    from huggingface_hub import constants

    before, constants.HF_HUB_OFFLINE = constants.HF_HUB_OFFLINE, True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before


def needs_download(error: BaseException) -> bool:
    """Whether an error comes from a file of the hub that is not in the local cache."""
    from huggingface_hub.errors import LocalEntryNotFoundError, OfflineModeIsEnabled

    seen: set[int] = set()
    link: BaseException | None = error
    while link is not None and id(link) not in seen:
        if isinstance(link, LocalEntryNotFoundError | OfflineModeIsEnabled):
            return True
        seen.add(id(link))
        link = link.__cause__ or link.__context__
    return False


def not_cached(what: str) -> str:
    """A sentence that a file of the hub is not in the local cache, and whether a run would download it."""
    set_offline = any(
        os.environ.get(name, "").lower() in ("1", "true", "yes", "on")
        for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")
    )
    then = "HF_HUB_OFFLINE keeps a run from downloading it" if set_offline else "a run would download it"
    return f"{what} is not in this machine's cache; {then}"


@contextlib.contextmanager
def _without_bar() -> Iterator[None]:
    """A context in which transformers shows no progress bar for loading weights: there are none."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


@contextlib.contextmanager
def _without_memory() -> Iterator[None]:
    """A context in which every parameter that a module registers goes to the meta device."""
    register = nn.Module.register_parameter

    def on_meta(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        register(module, name, parameter)
        if type(parameter) is nn.Parameter and _is_plain(parameter) and not parameter.is_meta:
            moved = nn.Parameter(parameter.detach().to("meta"), parameter.requires_grad)
            setattr(moved, _MARK, True)
            module._parameters[name] = moved

    nn.Module.register_parameter = on_meta  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        nn.Module.register_parameter = register  # type: ignore[method-assign]


def _fill(module: nn.Module) -> None:
    """Replace the parameters that `_without_memory` moved by zeros, in place; tied parameters stay tied."""
    done: dict[int, nn.Parameter] = {}
    for part in module.modules():
        for name, parameter in part._parameters.items():
            if parameter is None or not parameter.is_meta or not hasattr(parameter, _MARK):
                continue  # parameters that the builder itself left on the meta device have no weights
            if id(parameter) not in done:
                done[id(parameter)] = nn.Parameter(_zeros(parameter.shape, parameter.dtype), requires_grad=False)
            part._parameters[name] = done[id(parameter)]


def _tensors(module: nn.Module) -> Iterator[torch.Tensor]:
    yield from module.parameters()
    yield from module.buffers()


def _is_plain(parameter: nn.Parameter) -> bool:
    return type(parameter.data) is torch.Tensor and parameter.is_floating_point() and parameter.dtype.itemsize >= 2


def _zeros(shape: torch.Size, dtype: torch.dtype) -> torch.Tensor:
    """Zeros; float32 for floating-point types, as a run loads them. numpy's zeros take no memory until written."""
    if dtype.is_floating_point and dtype.itemsize >= 2:
        return torch.from_numpy(np.zeros(tuple(shape), np.float32))
    return torch.zeros(shape, dtype=dtype)
