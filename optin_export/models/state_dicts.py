"""State dicts: which part of a checkpoint fits a model, under which names, and which entries remain."""

from __future__ import annotations

import re
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from optin_export.errors import InputError
from optin_export.models.parametrizations import folded_state

#: Segments that wrappers insert into names: torch.compile, FSDP, activation checkpointing, Lightning Fabric.
_WRAPPERS = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_forward_module")
#: The segment of DataParallel and DistributedDataParallel; a model may also have a submodule of this name.
_PARALLEL = "module"
#: Entries of a checkpoint that hold tensors but never the weights.
_NOT_WEIGHTS = re.compile(r"^(optim|lr_|sched|scaler|grad_|loss|metric|random|rng|callbacks|state$|param_groups)", re.I)
#: Names of weights averaged over the training.
_AVERAGED = re.compile(r"(^|[._])(ema|swa|avg|averaged|shadow)([._]|$)|model_ema|_ema\b", re.I)
#: Maximum depth at which state dicts are searched in a checkpoint.
_MOST_LEVELS = 3
#: Maximum number of names of each kind in an error or a note.
_SHOWN = 3

#: Last segment of an entry that no model needs -> its description.
_EXTRAS = {
    "total_ops": "counters of a profiler",
    "total_params": "counters of a profiler",
    "num_batches_tracked": "counters of the training",
    "n_averaged": "counters of the training",
    "position_ids": "constants that the model makes itself",
    "token_type_ids": "constants that the model makes itself",
    "relative_position_index": "constants that the model makes itself",
    "relative_coords_table": "constants that the model makes itself",
    "attn_mask": "constants that the model makes itself",
    "masked_bias": "constants that the model makes itself",
    "inv_freq": "constants that the model makes itself",
}


@dataclass(frozen=True)
class Candidate:
    """A state dict in a checkpoint. where: its entry. prefix: the prefix of its names. others: names without it.

    missing: names of the model that it lacks.
    """

    where: str
    prefix: str
    state: Mapping[str, torch.Tensor]
    others: tuple[str, ...]
    missing: tuple[str, ...]

    @property
    def name(self) -> str:
        """The entry's name without what wrappers added, as a user writes it."""
        inner = [part for part in self.prefix.split(".") if part and part not in (*_WRAPPERS, _PARALLEL)]
        return ".".join([self.where, *inner] if self.where else inner)


def choose(content: Any, module: nn.Module, path: Path, key: str | None) -> tuple[dict[str, torch.Tensor], list[str]]:
    """The state dict in `content` that fits `module`, under the module's names; and notes for the user.

    content: a checkpoint's content, with state dicts at any level. key: the entry that the user named, or None.
    If two fit and one is an average over the training, the average is chosen, as in timm. Raises InputError if none or
    several fit, and for a key that does not exist.
    """
    names = _Names(module)
    found = [one for where, state in _state_dicts(content) for one in _candidates(where, state, names)]
    if key is not None:
        named = [one for one in found if key in (one.name, one.where)]
        if not named:
            known = sorted({one.name for one in found if one.name})
            raise InputError(
                f"the checkpoint {path} has no weights '{key}'",
                f"it has {', '.join(known[:8]) or 'at its top level, without a name'}",
                "give one of them after the #, or leave it out",
            )
        found = [one for one in named if one.name == key] or named
    if not found:
        why = "it holds no state dict"
        if isinstance(content, Mapping) and content:
            why += f"; its entries are {', '.join(map(str, list(content)[:6]))}"[:200]
        raise InputError(f"cannot use the checkpoint {path}", why, "save model.state_dict()")
    whole = [one for one in found if not one.missing]
    shaped = [one for one in whole if all(one.state[name].shape == own.shape for name, own in names.common(one.state))]
    whole = _distinct(shaped or whole)
    if not whole:
        best = min(found, key=lambda one: len(one.missing))
        return dict(best.state), []
    notes: list[str] = []
    chosen = whole[0]
    if len(whole) > 1:
        averaged = [one for one in whole if _AVERAGED.search(one.name)]
        if len(averaged) != 1 or len(whole) != 2:
            raise InputError(
                f"the checkpoint {path} holds {len(whole)} sets of weights that fit the model",
                f"they differ, and are named {', '.join(one.name or '(top level)' for one in whole[:6])}",
                f"choose one: model.weights: {path}#{whole[0].name or whole[1].name}",
            )
        chosen = averaged[0]
        other = next(one for one in whole if one is not chosen)
        instead = f"; {path.name}#{other.name} takes those of the last step" if other.name else ""
        notes.append(f"took '{chosen.name}', the weights averaged over the training, as timm does{instead}")
    others = [name for name in chosen.others if _extra(name, None) is None]
    if others:
        notes.append(
            f"left out {len(others)} entries outside '{chosen.prefix}', which are not part of the model: {few(others)}"
        )
    return dict(chosen.state), notes + _notes_of({name: what for name in chosen.others if (what := _extra(name, None))})


def fit(module: nn.Module, state: Mapping[str, torch.Tensor], path: Path, assign: bool = False) -> list[str]:
    """Load all of `state` into `module`, setting every weight of the module; returns notes on harmless extra entries.

    assign: replace the module's tensors by those of `state`, rather than copying their values.

    Values are cast to the module's types. Raises InputError that names missing and unexpected keys, and both shapes
    where they differ.
    """
    names = _Names(module)
    missing = names.missing(state)
    unexpected = [name for name in state if name not in names.own]
    extras = {name: what for name in unexpected if (what := _extra(name, state[name])) is not None}
    unexpected = [name for name in unexpected if name not in extras]
    shapes = [
        f"{name} is {_shape(tensor)} in the file and {_shape(names.own[name])} in the model"
        for name, tensor in state.items()
        if name in names.own and tensor.shape != names.own[name].shape
    ]
    problems = [f"{len(missing)} missing: {few(missing)}"] if missing else []
    problems += [f"{len(unexpected)} unexpected: {few(unexpected)}"] if unexpected else []
    problems += [f"{len(shapes)} of another shape: {few(shapes)}"] if shapes else []
    if problems:
        fix = "check model.source and model.args (such as num_classes) against the checkpoint"
        raise InputError(f"the checkpoint {path} does not fit the model", "; ".join(problems), fix)
    values = {name: _value(name, tensor, names.own[name], path) for name, tensor in state.items() if name in names.own}
    result = module.load_state_dict(versioned(values, module, state), strict=False, assign=assign)
    lost = [name for name in result.missing_keys if name in names.missing(values)] + list(result.unexpected_keys)
    assert not lost, f"torch did not load {lost[:_SHOWN]}"
    notes = _notes_of(extras)
    made = [
        name for name in names.own if name not in values and names.is_made(name) and not names.is_tied(name, values)
    ]
    if made:
        notes.append(f"{len(made)} buffers that the file lacks keep the model's own values: {few(made)}")
    return notes


def versioned(
    values: Mapping[str, torch.Tensor], module: nn.Module, state: Mapping[str, torch.Tensor] | None = None
) -> Mapping[str, torch.Tensor]:
    """The values with the versions of the module's classes, which some of them ask for (torchvision's MNASNet).

    state: where the values come from; torch records the versions there, but no file of safetensors has them.
    """
    result: OrderedDict[str, torch.Tensor] = OrderedDict(values)
    own = getattr(module.state_dict(), "_metadata", None)
    result._metadata = getattr(state, "_metadata", None) or own  # type: ignore[attr-defined]
    return result


class _Names:
    """The names of a module's weights and buffers, and which of them a checkpoint may lack."""

    def __init__(self, module: nn.Module) -> None:
        self.own = {name: tensor for name, tensor in module.state_dict().items() if isinstance(tensor, torch.Tensor)}
        self._parameters = {name for name, _ in module.named_parameters(remove_duplicate=False)}
        same: dict[tuple[Any, ...], list[str]] = {}
        for name, parameter in module.named_parameters(remove_duplicate=False):
            same.setdefault((id(parameter),), []).append(name)
        self._tied = {name: names for names in same.values() for name in names if len(names) > 1}

    def common(self, given: Mapping[str, Any]) -> Iterator[tuple[str, torch.Tensor]]:
        """The model's own names that are given."""
        return ((name, tensor) for name, tensor in self.own.items() if name in given)

    def is_tied(self, name: str, given: Iterable[str]) -> bool:
        """Whether the same weight is given under another name: libraries save tied weights only once."""
        return any(other in given for other in self._tied.get(name, ()))

    def is_made(self, name: str) -> bool:
        """Whether the name is a buffer that the model computes itself."""
        return name not in self._parameters and name.rpartition(".")[2] in _EXTRAS

    def missing(self, given: Mapping[str, Any]) -> list[str]:
        """Required names that a checkpoint with the names `given` lacks."""
        return [
            name for name in self.own if name not in given and not self.is_tied(name, given) and not self.is_made(name)
        ]


def _state_dicts(content: Any, where: str = "", level: int = 0) -> Iterator[tuple[str, dict[str, torch.Tensor]]]:
    """Mappings of names to tensors in a checkpoint, the outermost first, with the path of entries to each."""
    if not isinstance(content, dict) or level > _MOST_LEVELS:
        return
    entries = list(dict.items(content))
    tensors = {key: value for key, value in entries if isinstance(key, str) and isinstance(value, torch.Tensor)}
    if tensors:
        yield where, tensors
    for key, value in entries:
        if isinstance(key, str) and isinstance(value, dict) and not _NOT_WEIGHTS.match(key):
            yield from _state_dicts(value, f"{where}.{key}" if where else key, level + 1)


def _candidates(where: str, state: dict[str, torch.Tensor], names: _Names) -> list[Candidate]:
    """The ways to read one state dict: without the names of wrappers, and without each prefix that fits.

    Names that already fit are not changed; if no reading is complete, the closest ones are returned.
    """
    nearest: list[Candidate] = []
    for segments in ((), _WRAPPERS, (*_WRAPPERS, _PARALLEL)):
        plain = _without(state, segments)
        if plain is None:
            continue
        plain = folded_state(plain, names.own)
        read = [_under(where, prefix, plain, names) for prefix in _prefixes(plain, names)]
        whole = [one for one in read if not one.missing]
        if whole:
            return whole
        nearest += read
    return [min(nearest, key=lambda one: len(one.missing))]


def _without(state: dict[str, torch.Tensor], segments: tuple[str, ...]) -> dict[str, torch.Tensor] | None:
    """The state dict without these segments of names; None if two names would become equal."""
    renamed = {".".join(part for part in name.split(".") if part not in segments): name for name in state}
    return {new: state[old] for new, old in renamed.items()} if len(renamed) == len(state) else None


def _prefixes(state: Mapping[str, torch.Tensor], names: _Names) -> list[str]:
    """Possible prefixes of the model's names, "" first."""
    required = names.missing({})
    anchors = {required[index] for index in (0, len(required) // 2, -1)} if required else set()
    found = {name.removesuffix(anchor) for anchor in anchors for name in state if name.endswith(f".{anchor}")}
    return ["", *sorted(found)]


def _under(where: str, prefix: str, state: Mapping[str, torch.Tensor], names: _Names) -> Candidate:
    inside = {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}
    # The names of a norm's two vectors in transformers' oldest checkpoints.
    inside = {_renamed(name, names): tensor for name, tensor in inside.items()}
    others = tuple(name for name in state if not name.startswith(prefix))
    return Candidate(where, prefix, inside, others, tuple(names.missing(inside)))


def _renamed(name: str, names: _Names) -> str:
    if name in names.own:
        return name
    for old, new in ((".gamma", ".weight"), (".beta", ".bias")):
        if name.endswith(old) and name.removesuffix(old) + new in names.own:
            return name.removesuffix(old) + new
    return name


def _distinct(candidates: list[Candidate]) -> list[Candidate]:
    """The candidates that hold different weights."""
    kept: list[Candidate] = []
    for one in candidates:
        if not any(_equal(one.state, other.state) for other in kept):
            kept.append(one)
    return kept


def _equal(one: Mapping[str, torch.Tensor], other: Mapping[str, torch.Tensor]) -> bool:
    names = {name for name in one if _extra(name, one[name]) is None}
    return names == {name for name in other if _extra(name, other[name]) is None} and all(
        one[name].shape == other[name].shape and torch.equal(one[name], other[name].to(one[name].dtype))
        for name in names
    )


def _extra(name: str, tensor: torch.Tensor | None) -> str | None:
    """A description of an entry that no model needs; None for a weight."""
    if name.endswith("attn.bias") and tensor is not None and tensor.dim() == 4:
        return "constants that the model makes itself"  # the causal mask of GPT-2's older checkpoints
    return _EXTRAS.get(name.rpartition(".")[2])


def _value(name: str, tensor: torch.Tensor, own: torch.Tensor, path: Path) -> torch.Tensor:
    """The tensor in the module's type. Raises InputError if the cast would change it beyond rounding."""
    kind = str(tensor.dtype).removeprefix("torch.")
    if tensor.is_meta:
        raise InputError(f"the checkpoint {path} holds no values", f"{name} is on the meta device", "save it again")
    if tensor.layout != torch.strided:
        tensor = tensor.to_dense()
    counts = not own.is_floating_point()
    plain = tensor.is_floating_point() and tensor.dtype.itemsize > 1
    if tensor.is_quantized or tensor.is_complex() or not (plain or counts):
        fix = "use the checkpoint of before it was quantised or converted"
        raise InputError(f"the checkpoint {path} does not hold plain numbers", f"{name} is {kind}", fix)
    if counts and not torch.equal(tensor.to(own.dtype).double(), tensor.double()):
        whole = str(own.dtype).removeprefix("torch.")
        raise InputError(f"the checkpoint {path} does not fit", f"{name} is {kind}, not {whole}", "save it again")
    return tensor


def _notes_of(extras: Mapping[str, str]) -> list[str]:
    """One note for each kind of entry that is ignored because no model needs it."""
    kinds: dict[str, list[str]] = {}
    for name, what in extras.items():
        kinds.setdefault(what, []).append(name)
    return [f"left out {len(of)} {what}, no weights: {few(of)}" for what, of in kinds.items()]


def _shape(tensor: torch.Tensor) -> str:
    return str(list(tensor.shape))


def is_extra(name: str) -> bool:
    """Whether no model needs an entry of this name: a counter, or a constant that the model computes itself."""
    return _extra(name, None) is not None


def few(names: Iterable[str]) -> str:
    """The first of these names, as one line."""
    names = list(names)
    return ", ".join(names[:_SHOWN]) + (" ..." if len(names) > _SHOWN else "")
