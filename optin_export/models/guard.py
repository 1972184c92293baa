"""Limits on what an untrusted model description may allocate and read while the model is built."""

from __future__ import annotations

import math
import re
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from optin_export.errors import InputError
from optin_export.workdir.files import regular

#: Maximum tensors of a model; the largest known models have a few thousand.
MOST_TENSORS = 200_000
#: Operations with fewer input elements are not checked: their output is bounded by the square of that number.
_SMALL = 1 << 12

#: Configuration fields that would load external code or files; a rebuild uses none of them.
_NOT_BUILT = (
    "auto_map",
    "quantization_config",
    "attn_implementation",
    "_attn_implementation",
    "_attn_implementation_internal",
    "experts_implementation",
    "_experts_implementation",
    "use_kernels",
    "custom_pipelines",
)
#: Fields of a configuration with a backbone: it is not loaded by name and not with its own weights.
_BACKBONE = {"backbone": None, "use_pretrained_backbone": False, "use_timm_backbone": False}
#: Suffixes of files that describe a model or its tokenizer, and their maximum bytes.
_DESCRIBING, MOST_DESCRIBED = (".json", ".txt", ".model", ".jinja"), 1 << 30
#: Arguments of timm.create_model that would make it read files.
READS_FILES = ("checkpoint_path", "pretrained", "pretrained_cfg", "pretrained_cfg_overlay", "cache_dir")


#: Maximum layers of a model: building a thousand times the layers of the deepest known models would take hours.
MOST_LAYERS = 10_000
#: Configuration fields that hold a number of layers of any part.
_LAYERS = re.compile(r"(num_|n_)?(\w*_)?(layers?|blocks?|depths?|stages?)|n_layer|num_layers|depth", re.IGNORECASE)


class TooLarge(Exception):
    """An allocation larger than any legitimate model needs."""


class Allocations(TorchDispatchMode):
    """A context in which an operation that would allocate beyond `limit` bytes raises TooLarge before it does.

    The limit applies to the sum of all tensors that are made from a size alone (weights and buffers), and separately to
    the result of each operation on other tensors.
    """

    def __init__(self, limit: int) -> None:
        super().__init__()
        self.limit, self.bytes, self.tensors = limit, 0, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        if not func._schema.is_mutable:
            if not tensors:
                self.tensors += 1
                self.bytes += 4 * _asked(func, args)
                if self.bytes > self.limit or self.tensors > MOST_TENSORS:
                    raise TooLarge(f"it would take more than {self.limit >> 20} MiB")
            elif sum(tensor.numel() for tensor in tensors) > _SMALL and not func.is_view:
                self._check(func, args, kwargs)
        return func(*args, **kwargs)

    def _check(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Run the operation on shapes only first; an operation that needs values is run without this check."""
        from torch.utils._pytree import tree_map

        def shape_only(value: Any) -> Any:
            return value.to("meta") if isinstance(value, torch.Tensor) else value

        try:
            with torch.utils._python_dispatch._disable_current_modes():
                kwargs = {name: value for name, value in kwargs.items() if name != "device"}
                shaped = func(*tree_map(shape_only, args), **tree_map(shape_only, kwargs))
        except Exception:
            return
        made = sum(leaf.numel() * leaf.element_size() for leaf in tree_leaves(shaped) if isinstance(leaf, torch.Tensor))
        if made > self.limit:
            raise TooLarge(f"{func.__name__} would take {made >> 20} MiB, of {self.limit >> 20} MiB")


def _asked(func: Any, args: tuple[Any, ...]) -> int:
    """The number of elements that an operation without tensors would make; its dtype is ignored."""
    name = func._schema.name.removeprefix("aten::")
    if name == "arange":
        numbers = [float(value) for value in args if isinstance(value, int | float)]
        low, high, step = {1: (0.0, *numbers, 1.0), 2: (*numbers, 1.0)}.get(len(numbers), numbers[:3])
        return max(0, math.ceil((high - low) / step)) if step else 0
    if name == "linspace":
        return int(args[2])
    if name == "eye":
        return int(args[0]) ** 2
    return max((math.prod(sizes) for sizes in _sizes(args)), default=0)


def _sizes(args: tuple[Any, ...]) -> Iterator[tuple[int, ...]]:
    for value in args:
        if isinstance(value, list | tuple | torch.Size) and all(isinstance(size, int) for size in value):
            yield tuple(value)


def plain_config(value: Any) -> Any:
    """A configuration without fields that make transformers load anything else: kernels, code, other weights."""
    if isinstance(value, dict):
        kept = {key: plain_config(item) for key, item in value.items() if key not in _NOT_BUILT}
        return kept | {key: unset for key, unset in _BACKBONE.items() if key in kept}
    return [plain_config(item) for item in value] if isinstance(value, list) else value


def refuse_endless(config: Mapping[str, Any], source: str) -> None:
    """Raises InputError for a configuration (or arguments) with too many layers, before the model is built."""
    waiting: list[tuple[str, Any]] = list(config.items())
    while waiting:
        name, value = waiting.pop()
        if isinstance(value, Mapping):
            waiting += value.items()
        numbers = value if isinstance(value, list | tuple) else (value,)
        many = [one for one in numbers if isinstance(one, int) and abs(one) > MOST_LAYERS]
        if many and _LAYERS.fullmatch(name):
            raise InputError(
                f"cannot build the model of {source}",
                f"{name} in its configuration is more than {MOST_LAYERS}",
                "correct its config.json, or model.args",
            )


def refuse_no_files(folder: Path) -> None:
    """Raises InputError if a file that describes the model is not a regular file of a usual size: libraries would treat
    it as missing, wait for it, or read it endlessly."""
    for path in sorted([*folder.glob("*"), *folder.glob("*/*")]):
        if path.suffix not in _DESCRIBING:
            continue
        try:
            regular(path, MOST_DESCRIBED)
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or str(error)
            raise InputError(f"cannot use {path}", reason, "put the model's own file there, or remove it") from None


def refuse_packed(path: Path) -> None:
    """Refuse a compressed archive: torch.save does not compress, and unpacking could exhaust the memory."""
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            whole = sum(entry.file_size for entry in archive.infolist())
        if whole > path.stat().st_size + (1 << 20):
            raise ValueError(f"its {path.stat().st_size} bytes would become {whole}")
