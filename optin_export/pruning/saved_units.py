"""The units of a saved model that no family of this package declares, as data: loading needs no measurement."""

from __future__ import annotations

import dataclasses
from typing import Annotated, Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import nn

from optin_export.errors import InputError
from optin_export.pruning.code_sizes import is_code_size
from optin_export.pruning.saved_indices import Index, Number, extent, short, written_out
from optin_export.units import (
    Layer,
    Producer,
    Structure,
    Table,
    Transposed,
    UnitGroup,
    UnitKind,
    get_weight,
    is_declared_here,
)

Path = Annotated[str, Field(max_length=1000)]


class _Saved(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class SavedProducer(_Saved):
    path: Path
    fused: Annotated[int, Field(ge=1, le=64)] = 1
    norm: Path | None = None
    rows: Number | None = None
    index: Index | None = None
    keeps_inputs: bool = False


class SavedTable(_Saved):
    path: Path
    dim: Annotated[int, Field(ge=0, le=16)] = 0
    entries: Number = 1
    index: Index | None = None


class SavedColumns(_Saved):
    path: Path
    index: Index


class SavedGroup(_Saved):
    """A `UnitGroup`, as far as a rebuild needs it."""

    block: Number
    kind: UnitKind
    count: Annotated[int, Field(ge=1, le=1 << 31)]
    width: Annotated[int, Field(ge=1, le=1 << 31)]
    part: Path = ""
    producers: tuple[SavedProducer, ...]
    consumer: Path
    readers: tuple[Path, ...] = ()
    tables: tuple[SavedTable, ...] = ()
    sizes: tuple[tuple[Path, Number], ...] = ()
    sublayer: Path | None = None
    returns_tuple: bool = False
    expands: bool = False
    bypass: tuple[tuple[Path, bool], ...] = ()
    coupled: bool = False
    selects: tuple[Path, tuple[Path, ...]] | None = None
    found: bool = False
    columns: tuple[SavedColumns, ...] = ()


class SavedUnits(_Saved):
    """blocks: their paths; groups: as in `Structure`."""

    format: Literal["optin-export-units"] = "optin-export-units"
    blocks: tuple[Path, ...]
    groups: tuple[SavedGroup, ...]

    def structure(self, model: nn.Module, family: str) -> Structure:
        """The structure of a model that was just built. Raises InputError for layers or sizes that it does not have."""
        for saved in self.groups:
            _check_layers(model, saved)
        groups = tuple(_loaded(one) for one in self.groups)
        for group in groups:
            for attribute, per_unit in group.sizes:
                _check_size(model, group, attribute, per_unit * group.count)
        return Structure(family, self.blocks, groups)


def _check_layers(model: nn.Module, group: SavedGroup) -> None:
    """Before any index is written out: an index of a few bytes may name billions of rows."""
    for one in group.producers:
        dim = 1 if isinstance(_module(model, one.path), Transposed) else 0
        _check_entries(model, f"{one.path}.weight", dim, one.fused * (one.rows or 1), one.index, group.count)
    for table in group.tables:
        _check_entries(model, table.path, table.dim, table.entries, table.index, group.count)
    if group.selects is not None:
        _module(model, group.selects[0])
    columns = {one.path: one.index for one in group.columns}
    if unread := columns.keys() - {group.consumer, *group.readers}:
        raise _not_of_model(f"'{min(unread)}' does not read its units")
    for path in (group.consumer, *group.readers):
        layer = _module(model, path)
        if not isinstance(layer, Layer):
            raise _not_of_model(f"'{path}' is no layer that reads features")
        if path in columns:
            dim = 0 if isinstance(layer, Transposed) else 1
            _check_entries(model, f"{path}.weight", dim, 1, columns[path], group.count)
        elif get_weight(layer).shape[1] != group.count * group.width:
            raise _not_of_model(f"'{path}' does not read {group.count * group.width} features")


def _check_entries(model: nn.Module, name: str, dim: int, per_unit: int, index: Index | None, count: int) -> None:
    owner, _, leaf = name.rpartition(".")
    tensor = getattr(_module(model, owner), leaf, None)
    if not isinstance(tensor, torch.Tensor) or tensor.dim() <= dim:
        raise _not_of_model(f"there is no tensor '{name}' with {dim + 1} dimensions")
    named, end = (per_unit * count, 0) if index is None else extent(index)
    if max(named, end) > tensor.shape[dim]:
        raise _not_of_model(f"'{name}' has only {tensor.shape[dim]} entries")


def _check_size(model: nn.Module, group: UnitGroup, attribute: str, value: int) -> None:
    """Only an attribute of a module around the group's layers, with the value of all units, may be changed."""
    owner, parts = "", attribute.split(".")
    while parts and isinstance(getattr(_module(model, owner), parts[0], None), nn.Module):
        owner = f"{owner}.{parts.pop(0)}".lstrip(".")
    layers = [*(one.path for one in group.producers), *(one.path for one in group.tables), *group.reads]
    if owner and not any(layer.startswith(f"{owner}.") for layer in layers):
        raise _not_of_model(f"'{attribute}' is not near the layers of its units")
    if is_code_size(attribute):
        return
    found = _value(model, attribute)
    if type(found) is not int or found != value:
        raise _not_of_model(f"'{attribute}' is not {value}")


def _module(model: nn.Module, path: str) -> nn.Module:
    try:
        return model.get_submodule(path)
    except AttributeError:
        raise _not_of_model(f"there is no '{path}'") from None


def _not_of_model(why: str) -> InputError:
    return InputError("the saved units are not of this model", why[:300], "run the recipe with --force")


def saved_units(structure: Structure) -> SavedUnits | None:
    """The structure as data; None if families of this package declare all of it."""
    if is_declared_here(structure.family) and not any(group.found for group in structure.groups):
        return None
    return SavedUnits(blocks=structure.blocks, groups=tuple(_saved(group) for group in structure.groups))


def _saved(group: UnitGroup) -> SavedGroup:
    values: dict[str, Any] = {name: getattr(group, name) for name in SavedGroup.model_fields}
    values["producers"] = tuple(
        SavedProducer(**{**dataclasses.asdict(one), "index": short(one.index)}) for one in group.producers
    )
    values["tables"] = tuple(
        SavedTable(**{**dataclasses.asdict(one), "index": short(one.index)}) for one in group.tables
    )
    values["columns"] = tuple(SavedColumns(path=path, index=short(index) or ()) for path, index in group.columns)
    return SavedGroup(**values)


def _loaded(saved: SavedGroup) -> UnitGroup:
    values: dict[str, Any] = {name: getattr(saved, name) for name in SavedGroup.model_fields}
    values["producers"] = tuple(
        Producer(one.path, one.fused, one.norm, one.rows, written_out(one.index, saved.count), one.keeps_inputs)
        for one in saved.producers
    )
    values["tables"] = tuple(
        Table(one.path, one.dim, one.entries, written_out(one.index, saved.count)) for one in saved.tables
    )
    values["columns"] = tuple((one.path, written_out(one.index, saved.count) or ()) for one in saved.columns)
    return UnitGroup(residual=None, **values)


def _value(model: nn.Module, attribute: str) -> object:
    target: object = model
    for part in attribute.split("."):
        if isinstance(target, tuple | list):
            return target[int(part)] if part.isdigit() and int(part) < len(target) else None
        modules = target._modules if isinstance(target, nn.Module) else {}
        target = modules[part] if part in modules else vars(target).get(part)
        if target is None:
            return None
    return target
