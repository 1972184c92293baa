"""families: a module becomes a Structure (its blocks and units). One short file per architecture; see `_declare`."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Iterable, Sequence

from torch import nn

from optin_export.errors import InputError
from optin_export.families._costs import CostKind, Costs, Term, count_macs, count_params, measure_costs
from optin_export.families._declare import Family, Producer, Refusal, Structure, Table, Tokens, UnitGroup
from optin_export.families._hooks import (
    block_outputs,
    get_layer,
    get_module,
    get_scale,
    masked,
    refitted,
    replayed,
    rows_of,
    set_module,
    stopped_after,
    tensor_in,
    valid_rows,
)
from optin_export.families._outputs import Calls, calls_of, map_tensors, placeholder, tensor_of, tensors_in
from optin_export.families._rows import POSITIONS, as_matrix, columns_per_unit, input_rows, output_rows, reads_rows
from optin_export.families._topology import measured, notices
from optin_export.families._walk import Walk

__all__ = [
    "POSITIONS",
    "Calls",
    "CostKind",
    "Costs",
    "Family",
    "Producer",
    "Refusal",
    "Structure",
    "Table",
    "Term",
    "Tokens",
    "UnitGroup",
    "Walk",
    "as_matrix",
    "block_outputs",
    "calls_of",
    "columns_per_unit",
    "count_macs",
    "count_params",
    "find_structure",
    "find_tokens",
    "get_layer",
    "get_module",
    "get_scale",
    "input_rows",
    "map_tensors",
    "masked",
    "measure_costs",
    "measured",
    "nearest",
    "notices",
    "output_rows",
    "placeholder",
    "reads_rows",
    "refitted",
    "register",
    "replayed",
    "rows_of",
    "set_module",
    "stopped_after",
    "supported",
    "tensor_in",
    "tensor_of",
    "tensors_in",
    "valid_rows",
]


#: Families of the user's own files, by name.
_registered: dict[str, Family] = {}


def register(family: Family) -> None:
    """Make a family known that is declared outside this package; it is asked before the package's own.

    A file that a recipe names as `py:FILE.py:FUNCTION` may do so when it is imported: a family of the same name, as
    that file leaves it each time, takes the place of the one before.
    """
    _registered[family.name] = family


def supported() -> tuple[Family, ...]:
    """Every family: those that were registered, then one of each public module of this folder (`FAMILY`)."""
    names = sorted(module.name for module in pkgutil.iter_modules(__path__) if not module.name.startswith("_"))
    return *_registered.values(), *(importlib.import_module(f"{__name__}.{name}").FAMILY for name in names)


def find_structure(model: nn.Module, coupled: bool = False, units: Iterable[str] | None = None) -> Structure:
    """The structure of a task module with the units that may go; coupled: with the channels of its residual streams.

    units: only these kinds; None: all. Raises InputError if no family knows the module, if it has no units at all (of
    residual streams, with `coupled`), or if units of these kinds are there but cannot go one by one.
    """
    wanted = None if units is None else set(units)
    families = supported()
    for family in families:
        found = [(path, module) for path, module in model.named_modules() if family.is_block(module)]
        if not found:
            continue
        blocks, declared = _declared(family, found)
        refusals = [] if family.refusals is None else list(family.refusals(model))
        refusals += [one for one in declared if isinstance(one, Refusal)]
        for refusal in refusals:
            if wanted is None or refusal.kind in wanted:
                raise refusal.error
        groups = [one for one in declared if isinstance(one, UnitGroup) and one.kind not in {r.kind for r in refusals}]
        if coupled:
            groups = sorted([*_streams(family, model, found), *groups], key=lambda group: group.block)
        groups = [group for group in groups if group.count > 0]
        if not groups:
            raise InputError(
                "the model has nothing to prune", f"no block of family {family.name} has units", "use another model"
            )
        structure = Structure(family.name, tuple(blocks), tuple(groups), family.channels_first)
        return structure if wanted is None else structure.only(wanted)
    raise _unsupported(model, families)


def _unsupported(model: nn.Module, families: Sequence[Family]) -> InputError:
    inner = getattr(model, "model", model)
    near = nearest(inner, families)
    names, see = ", ".join(family.name for family in families), "`optin-export families` lists them"
    if near is None:
        return InputError(
            f"the architecture {type(inner).__name__} is not supported",
            f"no family knows its blocks; supported: {names}",
            f"use one of these ({see}), or add optin_export/families/NAME.py that declares FAMILY (docs/families.md)",
        )
    family, block, path, missing = near
    lacks = f", but no {' or '.join(missing)}" if missing else ", but is of another class or kind"
    has = ", ".join(part for part in family.parts if part not in missing)
    units = f"which layers make its {family.units[0]}, and which one reads them"
    return InputError(
        f"the architecture {type(inner).__name__} is not supported",
        f"no family knows its blocks; nearest: {family.name} ({block} '{path}' has {has}{lacks}); supported: {names}",
        f"use one of these ({see}), or add optin_export/families/NAME.py after the pattern of {family.name}: "
        f"is_block for {block}, and groups that say {units} (docs/families.md)",
    )


def nearest(module: nn.Module, families: Sequence[Family]) -> tuple[Family, str, str, list[str]] | None:
    """The family whose blocks are most like some module's parts: (family, class, path, parts it lacks).

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


def find_tokens(model: nn.Module) -> Tokens:
    """How the tokens of a task module can be merged; raises InputError if they cannot."""
    for family in supported():
        found = [(path, module) for path, module in model.named_modules() if family.is_block(module)]
        if found and family.tokens is not None:
            return family.tokens(model, found)
    able = ", ".join(family.name for family in supported() if family.tokens is not None)
    raise InputError(
        "the model's tokens cannot be merged", f"that is known for the families {able}", "set tokens.keep: 1.0"
    )


def _streams(family: Family, model: nn.Module, found: list[tuple[str, nn.Module]]) -> list[UnitGroup]:
    groups = [] if family.streams is None else family.streams(model, found)
    if not groups:
        why = (
            f"family {family.name} has none" if family.streams is None else "their shortcuts change channels by padding"
        )
        raise InputError("the model has no residual stream whose channels can go", why, "set prune.coupled: false")
    return groups


def _declared(family: Family, found: list[tuple[str, nn.Module]]) -> tuple[list[str], Sequence[UnitGroup | Refusal]]:
    if family.chain is not None:
        path, module = found[0]
        return family.chain(module, path)
    assert family.groups is not None
    groups = [group for index, (path, block) in enumerate(found) for group in family.groups(block, path, index)]
    return [path for path, _ in found], groups
