"""Read torch.save checkpoints without running any code that they name.

torch.load with weights_only=True builds tensors and plain containers. Other objects that training scripts store next to
the weights (argparse.Namespace, NumPy scalars, configurations) are not needed: names in `HARMLESS` are replaced by
stand-ins of this module, which keep nothing and import nothing. A file that names anything else is refused.
"""

from __future__ import annotations

import _compat_pickle
import pickletools
import re
import zipfile
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import torch

from optin_export.errors import InputError
from optin_export.models.checkpoint_kinds import refusal
from optin_export.models.guard import refuse_packed

#: Modules whose objects training scripts store in checkpoints next to the weights.
HARMLESS = (
    "accelerate", "addict", "argparse", "collections", "copyreg", "dataclasses", "datetime", "decimal", "easydict",
    "enum", "fractions", "fvcore.common.config", "lightning", "lightning_fabric", "lightning_utilities", "logging",
    "ml_collections", "mmcv", "mmengine", "numpy", "omegaconf", "packaging", "pathlib", "pytorch_lightning", "random",
    "re", "torch.optim", "torch.torch_version", "transformers.trainer_utils", "transformers.training_args", "types",
    "typing", "uuid", "yacs", "zoneinfo",
)  # fmt: skip
#: Built-in types, which name what a container was made of.
_TYPES = {"bool", "bytes", "dict", "float", "frozenset", "int", "list", "object", "range", "slice", "str", "tuple"}
#: Classes whose entries may hold weights: they become plain dictionaries and lists.
_DICTS = re.compile(
    r"\.(defaultdict|AttributeDict|EasyDict|ConfigDict|FrozenConfigDict|CfgNode|Dict|ChainMap|UserDict)$"
)
_LISTS = re.compile(r"\.deque$")
#: torch.load itself builds these.
_BUILT = re.compile(r"^(collections\.(OrderedDict|Counter)|builtins\.(set|complex|bytearray)|_codecs\.encode)$")
_TORCH = re.compile(
    r"^torch\.(_utils\._rebuild\w+|_tensor\._rebuild_from_type_v2|Size|Tensor|device|nn\.parameter\.Parameter"
    r"|serialization\._get_layout|(storage\.)?\w+Storage|\w+Tensor|(q?u?int|float|bfloat|complex)\w*|bool"
    r"|per_\w+_(affine|symmetric)\w*)$"
)
#: Objects that are models: the file holds one whole, not its weights.
_MODULES = ("torch.nn.modules.", "torch.fx.", "torch.nn.parallel.", "torchvision.models.", "timm.models.")
_SAVE = "torch.save(model.state_dict(), 'weights.pth')"


class Ignored:
    """Replaces an object that is not needed: accepts any arguments and state, and keeps none."""

    def __new__(cls, *args: Any) -> Ignored:
        return super().__new__(cls)

    def __init__(self, *args: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        pass


class _AsDict:
    """Replaces a kind of dictionary."""

    def __new__(cls, *args: Any) -> Any:
        return OrderedDict()


class _AsList:
    """Replaces a kind of list."""

    def __new__(cls, *args: Any) -> Any:
        return []


def unpickle(path: Path) -> Any:
    """The content of a file of torch.save, on the CPU, objects in `HARMLESS` as `Ignored`.

    Raises InputError for one that names other code, or that is damaged.
    """
    try:
        refuse_packed(path)
        names = list(dict.fromkeys(_names_in(path)))  # a model's own class comes before those of its parts
    except (ValueError, OSError, zipfile.BadZipFile, KeyError) as error:
        raise refusal(path, str(error) or type(error).__name__, "fetch or copy it again") from None
    foreign = [name for name in names if not _is_known(name)]
    if foreign:
        raise _refuse(path, names, foreign)
    stand_ins: list[Any] = [(_stand_in(name), name) for name in names if not (_BUILT.match(name) or _TORCH.match(name))]
    try:
        with torch.serialization.safe_globals(stand_ins):
            return torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except Exception as error:  # damaged files raise many types
        raise refusal(path, _reason(error), f"fetch or copy it again; or, where the model is, {_SAVE}") from error


def _is_known(name: str) -> bool:
    if _BUILT.match(name) or _TORCH.match(name):
        return True
    module, _, attribute = name.rpartition(".")
    if module == "builtins":
        return attribute in _TYPES
    return any(module == known or module.startswith(f"{known}.") for known in HARMLESS)


def _stand_in(name: str) -> type:
    if _DICTS.search(name):
        return _AsDict
    return _AsList if _LISTS.search(name) else _ignored(name)


def _ignored(name: str) -> type:
    """A separate class for each name, because torch.load looks names up by class."""
    return type("Ignored", (Ignored,), {"name": name})


def _refuse(path: Path, names: list[str], foreign: list[str]) -> InputError:
    """The error for a file that names code, saying which."""
    shown = ", ".join(foreign[:3]) + (f" and {len(foreign) - 3} more" if len(foreign) > 3 else "")
    if any(name.startswith(_MODULES) for name in names):
        owners = [name for name in foreign if not name.startswith("torch.nn.modules.")] or foreign
        why = f"it holds a whole pickled module ({', '.join(owners[:3])}), which only its own code can open"
        return refusal(path, why, f"where that code is, load it and save only the weights: {_SAVE}")
    why = f"it names {shown}, which would have to be run or imported to open it"
    return refusal(path, why, f"if you trust the file, open it where it was written and save only the weights: {_SAVE}")


def _names_in(path: Path) -> Iterator[str]:
    """Dotted names of everything that a pickle would import."""
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            name = next(name for name in archive.namelist() if name.endswith("data.pkl"))
            with archive.open(name) as file:
                yield from _names_in_pickle(file)  # type: ignore[arg-type]
        return
    with path.open("rb") as file:
        # Before 1.6 torch.save wrote one pickle after the other: a number, a version, the system, then the content.
        for number in range(4):
            try:
                yield from _names_in_pickle(file)
            except ValueError:
                if not number:
                    raise
                return  # no more pickles: torch.load says what is missing


def _names_in_pickle(file: BinaryIO) -> Iterator[str]:
    strings: list[str] = []
    for opcode, argument, _ in pickletools.genops(file):
        if opcode.name in ("GLOBAL", "INST"):
            module, _, name = str(argument).partition(" ")
            if (module, name) in _compat_pickle.NAME_MAPPING:
                module, name = _compat_pickle.NAME_MAPPING[(module, name)]
            yield f"{_compat_pickle.IMPORT_MAPPING.get(module, module)}.{name}"
        elif opcode.name == "STACK_GLOBAL":
            yield ".".join(strings[-2:])
        elif isinstance(argument, str):
            strings.append(argument)


def _reason(error: BaseException) -> str:
    """The first sentence of a library's message, without control sequences of a terminal."""
    text = re.sub(r"\x1b\[[0-9;]*m", "", str(error)).strip()
    if "Unsupported operand" in text:
        return "it was written with a newer pickle protocol than torch.save's own, which is not read safely"
    if "Invalid magic number" in text or "invalid load key" in text:
        return "it is a pickle that torch.save did not write"
    text = text.split("WeightsUnpickler error:")[-1].strip()
    return f"{type(error).__name__}: {text.splitlines()[0] if text else ''}"[:300]
