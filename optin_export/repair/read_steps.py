"""In which passes the layers that read units are observed for the loss curves: block by block, or several at once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from optin_export.models import TaskModel
from optin_export.repair.paired_forward import Stream
from optin_export.units import UnitGroup, get_layer, get_weight

#: Bytes of Gram matrices that are summed up in one pass of a model that runs whole in every pass.
GRAM_BYTES = 1 << 28


@dataclass(frozen=True)
class Step:
    """One pass. block: the last one that it runs. groups: of these blocks, but coupled ones. readers: the layers that
    are observed. until: the module at which the pass may stop."""

    block: int
    groups: tuple[UnitGroup, ...]
    readers: tuple[str, ...]
    until: str


def steps_of(stream: Stream, repaired: Mapping[str, Sequence[str]]) -> list[Step]:
    """The passes in their order, in which every layer of `repaired` (group key -> layers) is observed once.

    One per block; of a model that runs whole in every pass, one for all blocks whose Gram matrices fit into GRAM_BYTES
    together, because a pass per block would be quadratic in the depth.
    """
    structure, order, known = stream.structure, stream.structure.order, set[str]()
    coupled = [reader for group in structure.groups if group.coupled for reader in repaired[group.key]]
    steps = []
    for block in order:
        path, last = structure.blocks[block], block == order[-1]
        groups = tuple(group for group in structure.groups if group.block == block and not group.coupled)
        readers, until = [one for group in groups for one in repaired[group.key]], path
        for reader in coupled:
            inside = reader.startswith(path + ".")
            # The last stream is read after the last block.
            if inside or (last and reader not in known):
                readers.append(reader)
                until = path if inside else reader
        known.update(readers)
        steps.append(Step(block, groups, tuple(dict.fromkeys(readers)), until))
    return steps if stream.kept else _together(stream.model, steps)


def _together(model: TaskModel, steps: Sequence[Step]) -> list[Step]:
    found: list[Step] = []
    size = 0
    for step in steps:
        more = sum(8 * get_weight(get_layer(model, path)).flatten(1).shape[1] ** 2 for path in step.readers)
        if found and size + more <= GRAM_BYTES:
            size, before = size + more, found.pop()
            readers = tuple(dict.fromkeys((*before.readers, *step.readers)))
            found.append(Step(step.block, (*before.groups, *step.groups), readers, step.until))
        else:
            size = more
            found.append(step)
    return found
