"""`model.weights`: load a checkpoint as all weights of a model, or refuse it with what does not fit.

A checkpoint is a safetensors file, a torch.save file, a JSON index of shards, or a folder with one of them. `#KEY`
after the path names the entry of the file that holds the weights (`run/last.pth#teacher`).
"""

from __future__ import annotations

import contextlib
import json
import re
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn

from optin_export.errors import InputError
from optin_export.models.checkpoint_kinds import INDEX, SAFETENSORS, kind_of, refusal
from optin_export.models.lookup import read_shapes, unchanged
from optin_export.models.state_dicts import choose, fit
from optin_export.models.unpickling import unpickle
from optin_export.workdir.files import read_text

#: Maximum bytes of an index of shards.
_MAX_INDEX = 64 << 20
#: Names under which libraries save the weights of a folder, the preferred one first.
_WHOLE = (
    "model.safetensors.index.json",
    "model.safetensors",
    "pytorch_model.bin.index.json",
    "pytorch_model.bin",
)
_SUFFIXES = (".safetensors", ".pth", ".pt", ".th", ".bin", ".ckpt", ".tar")
_SHARD = re.compile(r"^(.+)-(\d+)-of-(\d+)(\.\w+)$")


def load_checkpoint(module: nn.Module, weights: str, looked_up: bool = False) -> list[str]:
    """Load `weights`, PATH or PATH#KEY, into `module`, in place; returns notes for the user.

    looked_up: only compare names and shapes; then only the headers of safetensors files are read.
    Every weight of the module gets its value, cast to the module's type. Raises InputError if the file has another
    format, names code, holds several candidates, or does not fit; the error names keys and shapes.
    """
    path, key = split(weights)
    content = _read(path, looked_up)
    state, notes = choose(content, module, path, key)
    with unchanged(module) if looked_up else contextlib.nullcontext():
        notes += fit(module, state, path, assign=looked_up)
    return [f"{path.name}: {note}" for note in notes]


def split(weights: str) -> tuple[Path, str | None]:
    """The path, and the key after the # if there is one. An existing file with a # in its name has no key."""
    path, _, key = weights.rpartition("#")
    return (Path(path), key) if path and not Path(weights).exists() else (Path(weights), None)


def _read(path: Path, shapes: bool) -> Any:
    """The content of a checkpoint: a mapping for safetensors, anything for a file of torch.save.

    shapes: tensors of safetensors may be zeros of the right shape and type, which take no memory.
    """
    try:
        if path.is_dir():
            return _read_folder(path, shapes)
        kind = kind_of(path)
        if kind == INDEX:
            return _read_shards(path, shapes)
        return _read_tensors(path, shapes) if kind == SAFETENSORS else unpickle(path)
    except InputError:
        raise
    except OSError as error:
        raise refusal(path, error.strerror or str(error), "check model.weights") from None
    except Exception as error:  # readers of archives and pickles raise many types for damaged bytes
        why = f"it is damaged ({type(error).__name__}: {error})"
        raise refusal(path, why[:300], "fetch or copy it again") from error


def _read_tensors(path: Path, shapes: bool) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    try:
        return read_shapes(path) if shapes else load_file(path)
    except (SafetensorError, ValueError, KeyError, TypeError) as error:  # a header may name types unknown to torch
        why = f"{type(error).__name__}: {error}"
        damaged = "incomplete" in why or "not fully covered" in why or "HeaderTooLarge" in why
        why = f"the file is truncated or damaged ({why})" if damaged else why
        raise refusal(path, why[:300], "fetch or copy it again") from error


def _read_shards(path: Path, shapes: bool) -> dict[str, Any]:
    """All files that an index names, together."""
    try:
        index = json.loads(read_text(path, _MAX_INDEX))
        names = sorted(set(index["weight_map"].values()))
        expected = set(index["weight_map"])
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        fix = "give the file with the weights, or an index of shards (model.safetensors.index.json)"
        raise refusal(path, "it is a JSON file without a 'weight_map' of shards", fix) from None
    return _together(path, names, expected, shapes)


def _together(path: Path, names: list[str], expected: set[str] | None, shapes: bool) -> dict[str, Any]:
    whole: dict[str, Any] = {}
    folder = path if path.is_dir() else path.parent
    for name in names:
        if not isinstance(name, str) or Path(name).name != name:
            raise refusal(path, f"it names the shard '{str(name)[:80]}', which is outside its folder", "correct it")
        if not (folder / name).is_file():
            raise refusal(path, f"its shard {name} is missing", f"copy all {len(names)} shards next to it")
        part = _read(folder / name, shapes)
        if not isinstance(part, dict):
            raise refusal(folder / name, "it holds no state dict", "copy the shards again")
        whole |= part
    missing = sorted((expected or set()) - whole.keys())
    if missing:
        raise refusal(path, f"no shard contains {missing[0]}", "copy the shards again: they come from different saves")
    return whole


def _read_folder(path: Path, shapes: bool) -> Any:
    """The one checkpoint in a folder."""
    files = sorted(one.name for one in path.iterdir() if one.is_file())
    found = next((name for name in _WHOLE if name in files), None)
    if found is not None:
        return _read(path / found, shapes)
    if any(name.startswith("adapter_model.") for name in files):
        raise refusal(path, "it holds a PEFT adapter, not a model", "save model.merge_and_unload() and use that")
    if ".metadata" in files or any(name.endswith(".distcp") for name in files):
        fix = "convert it: python -m torch.distributed.checkpoint.format_utils dcp_to_torch FOLDER weights.pth"
        raise refusal(path, "it holds a torch.distributed checkpoint, split over processes", fix)
    indices = [name for name in files if name.endswith(".index.json")]
    shards = {name: match for name in files if (match := _SHARD.match(name)) is not None}
    candidates = indices or [name for name in files if name.endswith(_SUFFIXES) and name not in shards]
    if len(candidates) == 1:
        return _read(path / candidates[0], shapes)
    kinds = {(match[1], match[3], match[4]) for match in shards.values()}
    if not candidates and len(kinds) == 1:
        (_, count, _) = next(iter(kinds))
        if len(shards) != int(count):
            raise refusal(path, f"it holds {len(shards)} of {int(count)} shards", "copy all of them")
        return _together(path, sorted(shards), None, shapes)
    if not candidates:
        fix = "give the file, or a folder with model.safetensors, pytorch_model.bin or their index"
        raise refusal(path, "the folder holds no checkpoint", fix)
    shown = ", ".join(candidates[:4]) + (" ..." if len(candidates) > 4 else "")
    raise refusal(path, f"the folder holds {len(candidates)} checkpoints: {shown}", f"name one: {path / candidates[0]}")
