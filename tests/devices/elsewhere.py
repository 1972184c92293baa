"""A second device on a machine that has only a CPU: `torch.device("elsewhere")`.

Its tensors hold a CPU tensor that only their own operations see. As on a GPU, an operation on tensors of both devices
is an error (zero-dimensional CPU tensors are scalars), and values reach the CPU by a copy only. Every such copy is
counted, by the line of this package that asked for it.
"""

from __future__ import annotations

import collections
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils import _pytree as pytree
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

NAME = "elsewhere"
aten = torch.ops.aten


class _Module:
    """What torch asks of a device's module."""

    def is_initialized(self) -> bool:
        return True

    def is_available(self) -> bool:
        return True

    def current_device(self) -> int:
        return 0

    def _is_in_bad_fork(self) -> bool:
        return False

    def manual_seed_all(self, seed: int) -> None: ...

    def device_count(self) -> int:
        return 1

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.float16, torch.bfloat16]


#: Copies to the CPU: 'file.py:function' -> [elements of each].
copies: dict[str, list[int]] = collections.defaultdict(list)
_library: Any = None


class Elsewhere(torch.Tensor):
    """held: the values, on the CPU."""

    held: torch.Tensor

    @staticmethod
    def __new__(cls, held: torch.Tensor) -> Any:
        found = torch.Tensor._make_wrapper_subclass(
            cls, held.size(), held.stride(), held.storage_offset(), dtype=held.dtype, device=torch.device(NAME, 0)
        )
        found.held = held
        return found

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _call(func, args, kwargs or {})


def _call(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    if func in (aten._to_copy.default, aten.copy_.default, aten._local_scalar_dense.default, aten.equal.default):
        return _across(func, args, kwargs)
    plain = [one for one in pytree.tree_leaves((args, kwargs)) if type(one) is torch.Tensor and one.dim()]
    indexed = func in (aten.index.Tensor, aten.index_put_.default, aten._index_put_impl_.default)
    if plain and not indexed:  # a GPU's indices may be on the CPU
        raise RuntimeError(f"{func}: expected all tensors on one device, found {NAME} and cpu {tuple(plain[0].shape)}")
    kwargs = {**kwargs, **({"device": "cpu"} if "device" in kwargs else {})}
    inner, named = pytree.tree_map_only(Elsewhere, lambda one: one.held, (args, kwargs))
    result = func(*inner, **named)
    outer = {id(one.held): one for one in pytree.tree_leaves((args, kwargs)) if isinstance(one, Elsewhere)}
    return pytree.tree_map_only(
        torch.Tensor, lambda one: outer[id(one)] if id(one) in outer else Elsewhere(one), result
    )


def _across(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    if func is aten._local_scalar_dense.default:
        _count(args[0])
        return func(args[0].held)
    if func is aten.equal.default:
        assert all(isinstance(one, Elsewhere) for one in args)
        return func(*(one.held for one in args))
    if func is aten.copy_.default:
        target, source = args[0], args[1]
        if isinstance(target, Elsewhere):
            target.held.copy_(source.held if isinstance(source, Elsewhere) else source)
        else:
            _count(source)
            target.copy_(source.held)
        return target
    wanted = kwargs.get("device")
    away = wanted is None or torch.device(wanted).type == NAME
    held = args[0].held if isinstance(args[0], Elsewhere) else args[0]
    copied = func(held, **{**kwargs, "device": None})
    copied = copied.clone() if copied is held else copied
    if not away:
        _count(args[0])
    return Elsewhere(copied) if away else copied


def _count(tensor: torch.Tensor) -> None:
    frames = [one for one in traceback.extract_stack() if "/optin_export/" in one.filename]
    where = f"{frames[-1].filename.rpartition('/optin_export/')[2]}:{frames[-1].name}" if frames else "tests"
    copies[where].append(tensor.numel())


def register() -> torch.device:
    """The device; registered once per process."""
    global _library
    if _library is None:
        _setup_privateuseone_for_python_backend(rename=NAME, backend_module=_Module())
        _library = torch.library.Library("_", "IMPL")
        _library.fallback(lambda func, *args, **kwargs: _call(func, args, kwargs), "PrivateUse1")
    return torch.device(NAME, 0)


@contextmanager
def counting() -> Iterator[dict[str, list[int]]]:
    copies.clear()
    yield copies
