"""Find all blocks of every family in a model, and combine them into one Structure in the order in which they run."""

from __future__ import annotations

import itertools
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import nn

from optin_export.errors import InputError
from optin_export.units.chains import NAME, conv_chains
from optin_export.units.declare import Family, Refusal, Structure, UnitGroup
from optin_export.units.discover import NAME as DISCOVERED
from optin_export.units.discover import Leak, discover_groups
from optin_export.units.discover.components import STREAM, Obstacle
from optin_export.units.isolation import isolated
from optin_export.units.shared_weights import Uses, calls_error
from optin_export.units.trace import Pass


@dataclass
class _Piece:
    """One block of a family, or a chain of blocks in one of its modules.

    root: the module that the family recognises. groups: their `block` counts within `blocks`.
    """

    family: str
    root: str
    blocks: list[str]
    groups: list[UnitGroup] = field(default_factory=list)
    refusals: list[Refusal] = field(default_factory=list)
    channels_first: bool = False
    start: int = 0


class Discovery:
    """The blocks of `families` in a model, and their removable units.

    seen: an observed pass of the model; None: order and calls are assumed from the order of the modules. further: also
    find units by measurement outside the families' blocks.
    """

    def __init__(
        self,
        model: nn.Module,
        families: Sequence[Family],
        seen: Pass | None,
        inputs: Mapping[str, torch.Tensor] | None,
        chains: bool,
        further: bool = False,
    ) -> None:
        self.model, self.families, self.seen, self.inputs, self.chains = model, families, seen, inputs, chains
        self.further = further
        self.uses = Uses(model, seen)
        self.found: list[tuple[str, nn.Module, Family]] = []
        self.pieces: list[_Piece] = []
        self.errors: list[tuple[str, InputError]] = []
        self.refused: list[Refusal] = []
        self.idle: list[Refusal] = []  # for blocks that never run, such as heads for training

    def structure(self, coupled: bool, wanted: Collection[str] | None) -> Structure | None:
        """None if no family supports a block of the model. Raises InputError as `find_structure` says."""
        self._collect()
        if not self.found:
            return None
        names = {family.name for _, _, family in self.found}
        if self.errors and len(names) == 1:
            raise self.errors[0][1]
        self.refused += [Refusal(kind, error) for family, error in self.errors for kind in self._family(family).units]
        self._leave_out_unused()
        for family in [family for family in self.families if family.name in names]:
            self._refuse_kinds(family)
        if not coupled and self.chains and self.seen is not None and self.pieces:
            self._add_chains()
        if self.further and not coupled and self.inputs is not None:
            self._add_found()
        self._order()
        groups = [replace(one, block=piece.start + one.block) for piece in self.pieces for one in piece.groups]
        if coupled:
            groups = sorted([*self._streams(names, groups), *groups], key=lambda group: group.block)
        groups = [group for group in groups if group.count > 0 and not self._is_shared(group)]
        self._raise_if_nothing_is_left(groups, wanted, sole=len(names) == 1, names=names)
        blocks = [path for piece in self.pieces for path in piece.blocks]
        kinds = [piece.family for piece in self.pieces for _ in piece.blocks]
        structure = Structure(
            " + ".join(sorted(dict.fromkeys(kinds), key=lambda name: name == NAME)),
            tuple(blocks),
            tuple(groups),
            frozenset(path for piece in self.pieces if piece.channels_first for path in piece.blocks),
            tuple(kinds) if len(set(kinds)) > 1 else (),
            tuple(one for one in self.refused if wanted is None or one.kind in wanted),
        )
        return structure if wanted is None else structure.only(wanted)

    def _family(self, name: str) -> Family:
        return next(family for family in self.families if family.name == name)

    def _collect(self) -> None:
        """Every module that a family recognises, except inside another block that has its own units."""
        covered: set[str] = set()
        for path, module in self.model.named_modules():
            family = next((family for family in self.families if family.is_block(module)), None)
            if family is None or any(path.startswith(f"{one}.") for one in covered if one) or "" in covered:
                continue
            self.found.append((path, module, family))
            piece = self._declared(path, module, family)
            if piece is None:
                continue
            self.pieces.append(piece)
            if piece.groups:
                covered.add(path)

    def _declared(self, path: str, module: nn.Module, family: Family) -> _Piece | None:
        piece = _Piece(family.name, path, [path], channels_first=family.channels_first)
        try:
            if family.chain is not None:
                piece.blocks, declared = family.chain(module, path)
            else:
                assert family.groups is not None
                declared = list(family.groups(module, path, 0))  # type: ignore[arg-type]
        except InputError as error:
            self.errors.append((family.name, error))
            return None if family.chain is not None else piece
        piece.groups = [one for one in declared if isinstance(one, UnitGroup)]
        piece.refusals = [one for one in declared if isinstance(one, Refusal)]
        return piece

    def _leave_out_unused(self) -> None:
        """Leave out blocks that run several times in a pass, or never: they can be neither replayed nor cut.

        Blocks on which the output does not depend (heads for training) are left out too: cutting them saves nothing.
        """
        kept = []
        for piece in self.pieces:
            calls = [(path, self.uses.calls(self.model.get_submodule(path))) for path in piece.blocks]
            wrong = next(((path, count) for path, count in calls if count != 1), None)
            if wrong is None and not self._matters(piece):
                wrong = piece.root, 0
            if wrong is None:
                kept.append(piece)
                continue
            error = calls_error(*wrong, self.uses.names[id(self.model.get_submodule(wrong[0]))])
            refusals = [Refusal(kind, error) for kind in dict.fromkeys(group.kind for group in piece.groups)]
            (self.refused if wrong[1] else self.idle).extend(refusals)
        self.pieces = kept

    def _matters(self, piece: _Piece) -> bool:
        return self.seen is None or self.seen.matters(self.model.get_submodule(piece.blocks[-1]))

    def _refuse_kinds(self, family: Family) -> None:
        """Apply a family's refusals of a kind to its own blocks only."""
        pieces = [piece for piece in self.pieces if piece.family == family.name]
        refusals = [] if family.refusals is None or not pieces else list(family.refusals(self.model))
        refusals += [refusal for piece in pieces for refusal in piece.refusals]
        kinds = {refusal.kind for refusal in refusals}
        variant = any(name == family.name for name, _ in self.errors)
        for piece in pieces:
            piece.groups = [] if variant else [group for group in piece.groups if group.kind not in kinds]
        self.refused += refusals

    def _add_chains(self) -> None:
        assert self.seen is not None and self.inputs is not None
        taken = {path for piece in self.pieces for group in piece.groups for path in group.reads}
        taken |= {producer.path for piece in self.pieces for group in piece.groups for producer in group.producers}
        taken |= {path for path, _, family in self.found if family.chain is None}
        groups = [group for group in conv_chains(self.model, self.seen, taken) if not self._is_shared(group)]
        groups = [group for group in groups if self.seen.matters(self.model.get_submodule(group.consumer))]
        for group in isolated(self.model, self.inputs, groups):
            self.pieces.append(_Piece(NAME, group.consumer, [group.consumer], [group], channels_first=True))

    def _add_found(self) -> None:
        assert self.inputs is not None
        known = [group for piece in self.pieces for group in piece.groups]
        found = discover_groups(self.model, self.inputs, known)
        for path, groups in found.blocks.items():
            around = any(one.startswith(f"{path}.") for piece in self.pieces for one in piece.blocks)
            usable = [group for group in groups if not self._is_shared(group)]
            inside = self._declared_block(path)
            if usable and inside is not None:
                piece, number = inside
                piece.groups += _numbered(usable, piece.groups, number)
            elif usable and not around:
                first = path in found.channels_first
                self.pieces.append(_Piece(DISCOVERED, path, [path], usable, channels_first=first))
        blocks = [piece.root for piece in self.pieces if piece.family == DISCOVERED]
        self.refused = [*still_refused(self.refused, blocks), *found.refusals]

    def _declared_block(self, path: str) -> tuple[_Piece, int] | None:
        """The piece, and the number of its block, that is this module or around it."""
        for piece in self.pieces:
            for number, block in enumerate(piece.blocks):
                if path == block or path.startswith(f"{block}."):
                    return piece, number
        return None

    def _is_shared(self, group: UnitGroup) -> bool:
        refusal = self.uses.refusal(group)
        if refusal is not None:
            self.refused.append(refusal)
        return refusal is not None

    def _order(self) -> None:
        if self.seen is not None:
            order = self.seen.order
            self.pieces.sort(key=lambda piece: order[id(self.model.get_submodule(piece.blocks[0]))])
        start = 0
        for piece in self.pieces:
            piece.start, start = start, start + len(piece.blocks)

    def _streams(self, names: Collection[str], groups: Sequence[UnitGroup]) -> list[UnitGroup]:
        """The coupled groups, with the number of the block that reads each first."""
        family = self._family(next(iter(names)))
        why = None
        if len(names) > 1:
            why = f"its blocks are of several families ({', '.join(sorted(names))}), and each may read the streams"
        elif family.streams is None:
            why = f"family {family.name} has none"
        found = [] if why or family.streams is None else family.streams(self.model, self._blocks_of(family))
        if not found:
            why = why or "their shortcuts change channels by padding"
        elif (other := self._other_reader([*found, *groups])) is not None:
            why = f"'{other}' may read them as well, outside the blocks"
        if why is not None:
            raise InputError(
                "the model has no residual stream with removable channels", why, "set prune.coupled: false"
            )
        return found

    def _blocks_of(self, family: Family) -> list[tuple[str, nn.Module]]:
        roots = [piece.root for piece in self.pieces if piece.family == family.name]
        return [(path, self.model.get_submodule(path)) for path in roots]

    def _other_reader(self, groups: Sequence[UnitGroup]) -> str | None:
        """A layer after the first block, outside all blocks, that is in no group."""
        if self.seen is None:
            return None
        known = {path for group in groups for path in group.reads}
        known |= {producer.path for group in groups for producer in group.producers}
        first = self.seen.order[id(self.model.get_submodule(self.pieces[0].blocks[0]))]
        roots = tuple(f"{piece.root}." for piece in self.pieces)
        for path, module in self.model.named_modules():
            runs = self.seen.order.get(id(module), -1) > first
            layer = isinstance(module, nn.Linear | nn.Conv1d | nn.Conv2d | nn.ConvTranspose2d)
            if runs and layer and path not in known and not path.startswith(roots):
                return path
        return None

    def _raise_if_nothing_is_left(
        self, groups: Sequence[UnitGroup], wanted: Collection[str] | None, sole: bool, names: Collection[str]
    ) -> None:
        kinds = {group.kind for group in groups}
        for refusal in self.refused:
            asked = wanted is None or refusal.kind in wanted
            # With several families the other families continue, unless the recipe names this kind.
            named = sole or (wanted is not None and len(wanted) < 3)
            if asked and refusal.kind not in kinds and (named or not kinds):
                raise refusal.error
        if not groups and self.idle:
            raise self.idle[0].error
        if not groups:
            family = " or ".join(sorted(names))
            raise InputError(
                "the model has nothing to prune", f"no block of family {family} has units", "use another model"
            )


def _numbered(found: Iterable[UnitGroup], known: Iterable[UnitGroup], block: int) -> list[UnitGroup]:
    """Found groups of a block that has declared ones, under names that these do not have."""
    names, numbered = {(one.block, one.kind, one.part) for one in known}, []
    for group in found:
        part = next(part for part in itertools.chain([""], map(str, itertools.count(2)))
                    if (block, group.kind, part) not in names)  # fmt: skip
        names.add((block, group.kind, part))
        numbered.append(replace(group, block=block, part=part))
    return numbered


def found_structure(
    model: nn.Module, inputs: Mapping[str, torch.Tensor], seen: Pass | None, wanted: Collection[str] | None
) -> Structure:
    """The structure of a model that no family supports, by measurement. Its groups are to be verified before use.

    Raises InputError if there are no units.
    """
    found, uses = discover_groups(model, inputs), Uses(model, seen)
    refused, groups = list(found.refusals), list[UnitGroup]()
    blocks: list[str] = []
    for path, ones in found.blocks.items():
        usable = []
        for group in ones:
            refusal = uses.refusal(group)
            if refusal is None:
                usable.append(replace(group, block=len(blocks)))
            else:
                refused.append(refusal)
        if usable:
            blocks.append(path)
            groups += usable
    if not groups:
        raise nothing_left(refused, found.mixed, found.left_out)
    structure = Structure(DISCOVERED, tuple(blocks), tuple(groups), found.channels_first, (), tuple(refused))
    return structure if wanted is None else structure.only(wanted)


def still_refused(refused: Iterable[Refusal], blocks: Iterable[str]) -> list[Refusal]:
    """The refusals without those of whole blocks whose units were found by measurement."""
    taken = tuple(f"'{block}'" for block in blocks)
    return [one for one in refused if not any(block in one.error.what for block in taken)]


def nothing_left(
    refused: Sequence[Refusal], mixed: Sequence[Leak] = (), left_out: Sequence[Obstacle] = ()
) -> InputError:
    """The error for a model without any unit that can be removed.

    mixed: layers whose input features are not kept apart; left_out: units that stay without a refusal (see
    `discover.Discovered`).
    """
    why = "every layer reads features that each depend on all outputs of the layers before it"
    fix = "use another model, or replace what mixes the features"
    if left_out:
        why = f"the units that '{left_out[0].path}' reads cannot be removed: {left_out[0].why}"
        if left_out[0].why == STREAM and not mixed and not refused:
            fix = "use another model; residual streams are pruned in models of known families only (prune.coupled)"
    if mixed:
        why = (
            f"each feature that '{mixed[0].path}' reads depends on several features of '{mixed[0].source}': "
            "something between them, such as a norm across features, mixes these"
        )
    if refused:
        why = f"{refused[0].error.what}: {refused[0].error.why}"
    return InputError("the model has nothing to prune", why, fix)
