"""families: a module becomes a Structure (its blocks and units). One short file per architecture; see `_declare`."""

from __future__ import annotations

import importlib
import pkgutil

from torch import nn

from optin_export.errors import InputError
from optin_export.families._costs import Costs, Term, count_macs, count_params, measure_costs
from optin_export.families._declare import Family, Producer, Structure, Table, Tokens, UnitGroup
from optin_export.families._hooks import (
    block_outputs,
    get_layer,
    get_module,
    masked,
    replayed,
    rows_of,
    set_module,
    stopped_after,
    tensor_of,
    valid_rows,
)

__all__ = [
    "Costs",
    "Family",
    "Producer",
    "Structure",
    "Table",
    "Term",
    "Tokens",
    "UnitGroup",
    "block_outputs",
    "count_macs",
    "count_params",
    "find_structure",
    "find_tokens",
    "get_layer",
    "get_module",
    "masked",
    "measure_costs",
    "replayed",
    "rows_of",
    "set_module",
    "stopped_after",
    "supported",
    "tensor_of",
    "valid_rows",
]


def supported() -> tuple[Family, ...]:
    """Every family: each public module of this folder declares one as `FAMILY`."""
    names = sorted(module.name for module in pkgutil.iter_modules(__path__) if not module.name.startswith("_"))
    return tuple(importlib.import_module(f"{__name__}.{name}").FAMILY for name in names)


def find_structure(model: nn.Module, coupled: bool = False) -> Structure:
    """The structure of a task module; coupled: with the channels of its residual streams.

    Raises InputError if no family knows it, or if it has no units (of residual streams, with `coupled`).
    """
    families = supported()
    for family in families:
        found = [(path, module) for path, module in model.named_modules() if family.is_block(module)]
        if not found:
            continue
        blocks, groups = _declared(family, found)
        if coupled:
            groups = sorted([*_streams(family, model, found), *groups], key=lambda group: group.block)
        groups = [group for group in groups if group.count > 0]
        if not groups:
            raise InputError(
                "the model has nothing to prune", f"no block of family {family.name} has units", "use another model"
            )
        later = () if family.read_later is None else tuple(family.read_later(found))
        return Structure(family.name, tuple(blocks), tuple(groups), family.channels_first, later)
    inner = getattr(model, "model", model)
    known = "; ".join(f"{family.name} ({family.examples})" for family in families)
    raise InputError(
        f"the architecture {type(inner).__name__} is not supported",
        f"no family knows its blocks; supported: {known}",
        "use one of these, or add optin_export/families/NAME.py that declares FAMILY (docs/families.md)",
    )


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


def _declared(family: Family, found: list[tuple[str, nn.Module]]) -> tuple[list[str], list[UnitGroup]]:
    if family.chain is not None:
        path, module = found[0]
        return family.chain(module, path)
    assert family.groups is not None
    groups = [group for index, (path, block) in enumerate(found) for group in family.groups(block, path, index)]
    return [path for path, _ in found], groups
