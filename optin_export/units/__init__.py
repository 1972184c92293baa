"""Describe a module as a Structure: its blocks, and the groups of units that can be removed from them.

`families/` has one file per architecture, in the terms of `declare` and `inside`; `discovery` finds their blocks in a
model; `topology` and `isolation` check the families' declarations by measurement; `costs` computes the costs of units;
`capture` is the only file that attaches hooks to a model; `hooks`, `trace` and `rows` use it to observe and change
forward passes.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

import optin_export.units.families as family_files
from optin_export.errors import InputError
from optin_export.units.alignment import reduced, steps_of
from optin_export.units.capture import (
    Point,
    attach,
    block_outputs,
    capture,
    captured,
    layer_inputs,
    layer_outputs,
    reset_caches,
)
from optin_export.units.chains import NAME as CHAINS
from optin_export.units.costs import CostKind, Costs, Term, count_macs, count_params, measure_costs
from optin_export.units.declare import (
    Family,
    Producer,
    Refusal,
    Structure,
    Table,
    Tokens,
    UnitGroup,
    UnitKind,
    class_named,
)
from optin_export.units.discover import NAME as FOUND
from optin_export.units.discover import discover_groups
from optin_export.units.discovery import Discovery, found_structure, nothing_left, still_refused
from optin_export.units.effort import Effort, LayerSize, later_share, layer_sizes
from optin_export.units.execution_order import Walk
from optin_export.units.family_file import load_family
from optin_export.units.hooks import (
    Convolution,
    Layer,
    Transposed,
    get_layer,
    get_module,
    get_scale,
    get_weight,
    masked,
    refitted,
    replayed,
    rows_of,
    set_module,
    tensor_in,
    valid_rows,
    with_weights,
)
from optin_export.units.inside import Inside
from optin_export.units.outputs import Calls, calls_of, map_tensors, placeholder, tensor_of, tensors_in
from optin_export.units.passes import TOKENS, few_rows
from optin_export.units.probes import without_zeros
from optin_export.units.query_keys import DIMENSIONS, QueryKeys
from optin_export.units.rows import (
    POSITIONS,
    as_matrix,
    columns_per_unit,
    columns_without,
    input_rows,
    of_units,
    output_rows,
    patches_of,
    reads_rows,
)
from optin_export.units.selected_heads import BUFFER as SELECTED_HEADS
from optin_export.units.selected_heads import arguments_by_head, select_heads
from optin_export.units.topology import measured, notices
from optin_export.units.trace import observe_pass

__all__ = [
    "DIMENSIONS",
    "POSITIONS",
    "SELECTED_HEADS",
    "TOKENS",
    "Calls",
    "Convolution",
    "CostKind",
    "Costs",
    "Effort",
    "Family",
    "Inside",
    "Layer",
    "LayerSize",
    "Point",
    "Producer",
    "QueryKeys",
    "Refusal",
    "Structure",
    "Table",
    "Term",
    "Tokens",
    "Transposed",
    "UnitGroup",
    "UnitKind",
    "Walk",
    "arguments_by_head",
    "as_matrix",
    "attach",
    "block_outputs",
    "calls_of",
    "capture",
    "captured",
    "class_named",
    "columns_per_unit",
    "columns_without",
    "count_macs",
    "count_params",
    "discover_groups",
    "few_rows",
    "find_query_keys",
    "find_structure",
    "find_tokens",
    "get_layer",
    "get_module",
    "get_scale",
    "get_weight",
    "input_rows",
    "is_covered",
    "is_declared_here",
    "later_share",
    "layer_inputs",
    "layer_outputs",
    "layer_sizes",
    "load_own_family",
    "map_tensors",
    "masked",
    "measure_costs",
    "measured",
    "nearest",
    "nothing_left",
    "notices",
    "of_units",
    "output_rows",
    "patches_of",
    "placeholder",
    "reads_rows",
    "reduced",
    "refitted",
    "register",
    "replayed",
    "reset_caches",
    "rows_of",
    "select_heads",
    "set_module",
    "steps_of",
    "supported",
    "tensor_in",
    "tensor_of",
    "tensors_in",
    "valid_rows",
    "with_weights",
    "without_zeros",
]


#: Units are also searched by measurement if those of families hold a smaller share of the MACs.
COVERED = 0.5
#: Families from the user's files, by name.
_registered: dict[str, Family] = {}


def register(family: Family) -> None:
    """Register a family that is declared outside this package; it takes precedence over the package's families.

    A file that a recipe names as `py:FILE.py:FUNCTION` may call this when it is imported; a family of the same name
    replaces the previous one.
    """
    _registered[family.name] = family


def supported() -> tuple[Family, ...]:
    """Every family: those that were registered, then one of each public module of this folder (`FAMILY`)."""
    return *_registered.values(), *_shipped()


def _shipped() -> tuple[Family, ...]:
    names = sorted(module.name for module in pkgutil.iter_modules(family_files.__path__))
    return tuple(importlib.import_module(f"{family_files.__name__}.{name}").FAMILY for name in names)


def load_own_family(file: str | Path | None) -> tuple[Family, ...]:
    """The family in the user's file, if there is one; the file is executed. Raises InputError if it has none."""
    return () if file is None else (load_family(file, {CHAINS, FOUND, *(one.name for one in _shipped())}),)


def is_declared_here(family: str) -> bool:
    """Whether this package alone can find the units of such a structure again (see `Structure.family`)."""
    return set(family.split(" + ")) <= {CHAINS, *(one.name for one in _shipped())}


def find_structure(
    model: nn.Module,
    coupled: bool = False,
    units: Iterable[str] | None = None,
    inputs: Mapping[str, torch.Tensor] | None = None,
    families: Iterable[str] | None = None,
    own: Sequence[Family] = (),
    measure: bool = True,
) -> Structure:
    """The structure of a task module: the blocks of every family in it, and their removable units.

    Args:
        model: the task module.
        coupled: also with the channels of its residual streams.
        units: only these kinds; None: all.
        inputs: any valid inputs of two rows or more. With them one forward pass shows in which order blocks run, which
            modules run several times or not at all (they are not pruned), which outputs are read again later, and the
            channels of plain convolutions outside all blocks. Without them the order of the modules is used.
        families: names of the families to look for (as `Structure.family` joins them); None: all.
        own: families of the user, which take precedence.
        measure: find units by measurement where families know nothing, or less than half of the model; this takes
            `inputs`, and is not done for streams or for named `families`.

    Raises InputError if no family supports the module, if it has no units (or no residual streams, with `coupled`), or
    if units of these kinds exist but cannot be removed. With several families, the part that one of them refuses is not
    pruned, with the reason in `Structure.refused`, and the others continue.
    """
    names = None if families is None else set(families)
    known = [family for family in (*own, *supported()) if names is None or family.name in names]
    seen = None if inputs is None else observe_pass(model, inputs)
    wanted = None if units is None else set(units)
    discovery = Discovery(model, known, seen, inputs, chains=names is None or CHAINS in names)
    if inputs is None or coupled or names is not None or not measure:
        structure = discovery.structure(coupled, wanted)
    else:
        structure = _completed(discovery, wanted)
    if structure is None:
        raise _without_streams(model) if coupled else _unsupported(model, known)
    return structure


def is_covered(model: nn.Module, structure: Structure, inputs: Mapping[str, torch.Tensor]) -> bool:
    """Whether the units contain enough of the model's MACs, so that no further ones are found by measurement."""
    costs = measure_costs(model, structure, {name: tensor[:1] for name, tensor in inputs.items()})
    return 1 - costs.of("macs", dict.fromkeys(costs.units, 0)) / max(costs.macs, 1) >= COVERED


def _completed(discovery: Discovery, wanted: set[str] | None) -> Structure:
    """The families' structure; where they know nothing, or less than half of the model, with units that are found by
    measurement."""
    model, inputs = discovery.model, discovery.inputs
    assert inputs is not None
    try:
        structure = discovery.structure(False, wanted)
    except InputError as error:
        try:
            found = found_structure(model, inputs, discovery.seen, wanted)
        except InputError:
            raise error from None
        refused = still_refused(discovery.refused or [Refusal("neurons", error)], found.blocks)
        return replace(found, refused=(*refused, *found.refused))
    if structure is None:
        return found_structure(model, inputs, discovery.seen, wanted)
    if is_covered(model, structure, inputs):
        return structure
    further = Discovery(model, discovery.families, discovery.seen, inputs, discovery.chains, further=True)
    return further.structure(False, wanted) or structure


def _without_streams(model: nn.Module) -> InputError:
    return InputError(
        "the model has no residual stream with removable channels",
        f"families declare them, and no family knows the blocks of a {type(getattr(model, 'model', model)).__name__}",
        "set prune.coupled: false; heads, neurons and channels are then found by measurement",
    )


def _unsupported(model: nn.Module, families: Sequence[Family]) -> InputError:
    inner = getattr(model, "model", model)
    if len(families) == 1:
        return InputError(
            f"the family {families[0].name} does not know this model",
            f"its is_block is true for no module of the {type(inner).__name__}",
            "correct is_block, or name another model",
        )
    near = nearest(inner, families)
    names, see = ", ".join(family.name for family in families), "`optin-export families` lists them"
    if near is None:
        return InputError(
            f"the architecture {type(inner).__name__} is not supported",
            f"no family supports its blocks; supported: {names}",
            f"use one of these ({see}), or declare FAMILY in optin_export/units/families/NAME.py (docs/families.md)",
        )
    family, block, path, missing = near
    lacks = f", but no {' or '.join(missing)}" if missing else ", but is of another class or kind"
    has = ", ".join(part for part in family.parts if part not in missing)
    units = f"which layers make its {family.units[0]}, and which one reads them"
    return InputError(
        f"the architecture {type(inner).__name__} is not supported",
        f"no family supports its blocks; nearest: {family.name} ({block} '{path}' has {has}{lacks}); known: {names}",
        f"use one of these ({see}), or add optin_export/units/families/NAME.py like {family.name}: "
        f"is_block for {block}, and groups that say {units} (docs/families.md)",
    )


def nearest(module: nn.Module, families: Sequence[Family]) -> tuple[Family, str, str, list[str]] | None:
    """The family with the most similar blocks: (family, class, path, parts it lacks).

    Compared are names of submodules; None if no module has at least half of the parts that a family declares.
    """
    best: tuple[float, tuple[Family, str, str, list[str]] | None] = (0.499, None)
    seen: set[type] = set()
    for path, part in module.named_modules():
        if type(part) in seen or isinstance(part, nn.ModuleList | nn.Sequential):
            continue
        seen.add(type(part))
        names = {name for name, _ in part.named_modules()}
        for family in families:
            missing = [name for name in family.parts if name not in names]
            share = 1 - len(missing) / len(family.parts) if family.parts else 0.0
            if share > best[0]:
                best = share, (family, type(part).__name__, path, missing)
    return best[1]


def find_query_keys(model: nn.Module, structure: Structure) -> tuple[QueryKeys, ...]:
    """The attentions of this structure whose queries and keys may have fewer dimensions than their values.

    Only those of known families, and with a hidden stream as input that loses no units itself.
    """
    read = {path for group in structure.groups for path in group.reads}
    families = {family.name: family for family in _shipped()}
    found = []
    for group in structure.groups:
        family = families.get(structure.families[group.block] if structure.families else structure.family)
        path = structure.blocks[group.block]
        if group.kind == "heads" and not group.found and family is not None and family.query_keys is not None:
            paths = family.query_keys(get_module(model, path), path)
            if paths is not None and not read.intersection(paths):
                found.append(QueryKeys(group.block, *paths, group.key, group.width))
    return tuple(found)


def find_tokens(model: nn.Module) -> Tokens:
    """How the tokens of a task module can be merged; raises InputError if they cannot."""
    found: dict[str, list[tuple[str, nn.Module]]] = {}
    families = {family.name: family for family in supported()}
    for path, module in model.named_modules():
        family = next((family for family in families.values() if family.is_block(module)), None)
        if family is not None:
            found.setdefault(family.name, []).append((path, module))
    if len(found) == 1:
        ((name, blocks),) = found.items()
        tokens = families[name].tokens
        if tokens is not None:
            return tokens(model, blocks)
    able = ", ".join(family.name for family in families.values() if family.tokens is not None)
    why = f"that is known for the families {able}"
    if len(found) > 1:
        why = f"its blocks are of several families ({', '.join(found)}); {why}, alone in a model"
    raise InputError("the model's tokens cannot be merged", why, "set tokens.keep: 1.0")
