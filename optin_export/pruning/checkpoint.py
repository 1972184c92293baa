"""Save and load a pruned model: `architecture.json` (what to build) and `model.safetensors` (weights), no pickle."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, model_validator
from safetensors.torch import load_file, save_file

from optin_export.errors import InputError, OptinError
from optin_export.models import Inputs, TaskModel, build
from optin_export.models.guard import Allocations
from optin_export.models.state_dicts import versioned
from optin_export.pruning.narrow_attention import narrow
from optin_export.pruning.rebuild import rebuild
from optin_export.pruning.saved_units import SavedUnits, saved_units
from optin_export.pruning.token_merging import count_tokens, insert_merging, places
from optin_export.search import Plan, check_merging, keep_first
from optin_export.units import Structure, find_query_keys, find_structure, find_tokens
from optin_export.workdir.files import atomic_path, read_json, regular, remove, sha256_json, write_text

#: Maximum bytes of an architecture.json.
MAX_BYTES = 16 << 20
#: Building a model may allocate this many times the bytes of its pruned weights (the unpruned model is built first and
#: traced), and at least this many bytes.
MOST_LARGER, LEAST_LIMIT = 64, 1 << 30
#: Largest relative difference between the outputs of a saved model and of the one that was saved.
SAME = 1e-4
#: Maximum total elements of the example inputs: two rows at the shipped shape.
MAX_ELEMENTS = 1 << 26


class GroupSize(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)
    count: Annotated[int, Field(ge=1)]
    kept: Annotated[int, Field(ge=0)]


class Architecture(BaseModel):
    """The unpruned architecture and how many units of each group the pruned model has.

    inputs: shapes and dtypes of example inputs, by name.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    format: Literal["optin-export-architecture"] = "optin-export-architecture"
    version: Literal[1] = 1
    base: dict[str, Any]
    family: str
    groups: dict[str, GroupSize]
    inputs: dict[str, tuple[Literal["int64", "float32"], tuple[Annotated[int, Field(ge=1, le=65536)], ...]]]
    output: str
    merged: tuple[Annotated[int, Field(ge=0)], ...] = Field(
        (), description="number of tokens merged in each block; empty: no merging"
    )
    dimensions: dict[str, Annotated[int, Field(ge=1)]] = Field(
        {}, description="dimensions of queries and keys per head in attentions that have fewer than the unpruned model"
    )
    units: SavedUnits | None = Field(
        None,
        description="the units, if they were found by measurement or declared by a file of the user; otherwise the "
        "family of this package declares them",
    )

    @model_validator(mode="after")
    def _is_plausible(self) -> Architecture:
        wrong = next((key for key in self.groups if not re.fullmatch(r"[^.]+(\.[^.]+)+", key)), None)
        if wrong is not None:
            raise ValueError(f"'{wrong:.60}' is not a group of units")
        if sum(math.prod(shape) for _, shape in self.inputs.values()) > MAX_ELEMENTS:
            raise ValueError(f"the example inputs have more than {MAX_ELEMENTS} elements")
        return self


def save_model(
    folder: Path, dense: TaskModel, base: dict[str, Any], structure: Structure, plan: Plan, inputs: Inputs
) -> Architecture:
    """Write architecture.json and model.safetensors of a pruned model, each atomically.

    structure: of the unpruned model.
    """
    architecture = Architecture(
        base=base,
        family=structure.family,
        groups={key: GroupSize(count=group.count, kept=len(group.kept)) for key, group in plan.groups.items()},
        inputs={
            name: ("float32" if tensor.is_floating_point() else "int64", tuple(tensor.shape))
            for name, tensor in inputs.items()
        },
        output=dense.output_name,
        merged=plan.merged,
        dimensions=plan.dimensions,
        units=saved_units(structure),
    )
    tied = _tied(dense)
    state = _apart({name: tensor for name, tensor in dense.state_dict().items() if name not in tied})
    with atomic_path(folder / "model.safetensors") as path:
        save_file(state, path, metadata={"format": "pt"})
    write_text(folder / "architecture.json", architecture.model_dump_json(indent=2) + "\n")
    return architecture


def save_places(path: Path, dense: TaskModel, inputs: Inputs) -> None:
    """Write images and the final token of each original token, for the report. Without merging, no file is written."""
    remove(path)
    found = places(dense, inputs) if "pixel_values" in inputs else None
    if found is not None:
        pixels = inputs["pixel_values"].movedim(1, -1).contiguous()
        with atomic_path(path) as temporary:
            save_file({"pixels": pixels, "places": found}, temporary)


@dataclass(frozen=True)
class PythonSource:
    """A user's function, as their own recipe names it: `model.source` and `model.args`."""

    source: str
    args: Mapping[str, Any]

    def is_that_of(self, base: Mapping[str, Any]) -> bool:
        """Whether an architecture names exactly this function with these arguments."""
        return base.get("source") == self.source and sha256_json(base.get("args")) == sha256_json(dict(self.args))


def load_model(folder: str | Path, trust_python: bool | PythonSource = False) -> TaskModel:
    """Rebuild a pruned model from a run's `model/` folder, in eval mode.

    Raises InputError for missing, damaged or mismatched files. `trust_python` allows an architecture that names a
    Python file, which is then executed: any file, or only the one that the user named elsewhere (the folder is not
    trusted).
    """
    folder = Path(folder)
    weights = folder / "model.safetensors"
    try:
        architecture = Architecture.model_validate(read_json(folder / "architecture.json", MAX_BYTES))
        state = load_file(regular(weights))
    except Exception as error:  # a safetensors header may name types that torch does not have
        raise InputError(
            f"cannot load a pruned model from {folder}", str(error)[:300], "give the model/ folder of a finished run"
        ) from None
    try:
        with Allocations(max(LEAST_LIMIT, MOST_LARGER * weights.stat().st_size)):
            return _assembled(folder, architecture, state, trust_python)
    except OptinError:
        raise
    except Exception as error:  # libraries raise any type for a configuration that they did not write
        raise InputError(
            f"cannot rebuild the model in {folder}",
            f"{type(error).__name__}: {error}"[:300],
            "give the model/ folder of a finished run, and the versions of manifest.json",
        ) from error


@torch.no_grad()
def difference(model: TaskModel, again: TaskModel, inputs: Inputs) -> str | None:
    """How the outputs of a loaded model differ from those of the one that was saved; None if they do not."""
    expected = model(**inputs)
    try:
        got = again(**inputs)
    except Exception as error:  # a module's own code, which may depend on what it computed before
        return f"it does not run: {type(error).__name__}: {error}"[:300]
    if got.shape != expected.shape:
        return f"its output is {list(got.shape)}, not {list(expected.shape)}"
    largest = float((got - expected).abs().max() / expected.abs().max().clamp(min=1e-12))
    return None if largest <= SAME else f"its outputs differ by {largest:.1e} of the largest"


def _assembled(
    folder: Path, architecture: Architecture, state: dict[str, torch.Tensor], trust_python: bool | PythonSource
) -> TaskModel:
    if isinstance(trust_python, PythonSource):
        if architecture.base.get("library") == "python" and not trust_python.is_that_of(architecture.base):
            raise InputError(
                f"the model in {folder} is not the model of the recipe",
                f"it would run {str(architecture.base.get('source'))[:200]!r}, and the recipe names "
                f"{trust_python.source!r}",
                "delete the folder, or run with --force: the model is built again",
            )
        trust_python = architecture.base.get("library") == "python"
    model = build(architecture.base, trust_python)
    kinds = {key.split(".")[1].rstrip("0123456789") for key in architecture.groups}
    groups = keep_first({key: (size.count, size.kept) for key, size in architecture.groups.items()})
    inputs = {
        name: torch.ones(shape, dtype=getattr(torch, kind)) for name, (kind, shape) in architecture.inputs.items()
    }
    coupled = any(key.count(".") > 1 for key in architecture.groups)
    if architecture.units is not None:
        structure = architecture.units.structure(model, architecture.family)
    else:
        structure = find_structure(model, coupled, kinds, inputs, architecture.family.split(" + "))
    # Groups in layers that do not run were not changed, and are not in the plan.
    known = tuple(group for group in structure.groups if group.key in architecture.groups)
    structure = dataclasses.replace(structure, groups=known)
    dense, _ = rebuild(model, structure, groups, inputs)
    narrow(dense, find_query_keys(model, structure), architecture.dimensions)
    _adopt_new_biases(dense, state)
    state |= {name: state[first] for name, first in _tied(dense).items() if first in state and name not in state}
    try:
        dense.load_state_dict(versioned(state, dense))
    except RuntimeError as error:
        raise InputError(
            f"the weights in {folder} do not fit its architecture.json", str(error)[:300], "run the recipe with --force"
        ) from error
    if any(architecture.merged):
        tokens = find_tokens(dense)
        counted = count_tokens(dense, structure, inputs)
        check_merging(architecture.merged, counted, tokens.prefix, len(structure.blocks))
        dense = insert_merging(dense, structure, tokens, architecture.merged)
    return dense.eval().requires_grad_(False)


def _tied(model: TaskModel) -> dict[str, str]:
    """Names of weights and buffers that have an earlier name as well: {name: the earlier one}."""
    first: dict[int, str] = {}
    tied: dict[str, str] = {}
    kept = model.state_dict().keys()
    for named in (model.named_parameters(remove_duplicate=False), model.named_buffers(remove_duplicate=False)):
        for name, tensor in named:
            if name in kept and first.setdefault(id(tensor), name) != name:
                tied[name] = first[id(tensor)]
    return tied


def _apart(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The tensors, contiguous; views of shared memory are copied: a safetensors file stores each tensor separately."""
    found, used = {}, set()
    for name, tensor in state.items():
        contiguous = tensor.contiguous()
        storage = contiguous.untyped_storage().data_ptr()
        found[name] = contiguous.clone() if storage in used else contiguous
        used.add(storage)
    return found


def _adopt_new_biases(dense: TaskModel, state: dict[str, torch.Tensor]) -> None:
    """Create the biases that the repair added to projections without one."""
    known = dense.state_dict()
    for name in state.keys() - known.keys():
        path, _, leaf = name.rpartition(".")
        if leaf == "bias" and f"{path}.weight" in known:
            dense.get_submodule(path).bias = torch.nn.Parameter(torch.zeros_like(state[name]))
