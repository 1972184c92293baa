"""The latency table: what engines of one target take when a group keeps fewer units. Measured elsewhere, data here.

Few counts are measured (anchors), each in an engine of full depth where every group of one signature keeps that many
units and all else is unpruned; the difference to the unpruned engine, shared by these groups, is what each one saves.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Annotated, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field
from scipy.interpolate import PchipInterpolator
from scipy.optimize import isotonic_regression

from optin_export.errors import InputError
from optin_export.units import Costs, Structure

#: Anchors between one step and all units, as shares of the units; a dropped sub-layer is one more.
SHARES = (0.25, 0.5, 0.75)
#: Engines of one table at most: a model of many different blocks gets fewer anchors for each.
MOST_ENGINES = 24
#: Costs are multiples of this share of the unpruned latency, far below what can be measured: so few cells make the
#: knapsack exact.
CELL = 1 / 20_000


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Anchor(_Part):
    """Nanoseconds that one group saves if it keeps this many units, with the 95 % interval."""

    kept: Annotated[int, Field(ge=0)]
    saved_ns: float
    low_ns: float
    high_ns: float


class LatencyTable(_Part):
    """One target, batch size and shape. base_ns: of the unpruned engine. full_ns: of the one that keeps all units; less
    than base_ns where tokens are merged.

    floor, floor_ns: about the fewest units of all groups at once, and the engine that keeps them: savings are added
    up, and where little is left of a model that goes wrong first.
    units: group key -> number of units. signatures: group key -> what it shares with the groups of its shapes. anchors:
    by signature, of all counts that were measured. scale: a correction by engines of whole plans.
    """

    version: Literal[1] = 1
    target: str
    batch: int
    sequence: int | None
    base_ns: int
    full_ns: int
    floor_ns: int
    floor: dict[str, int]
    units: dict[str, int]
    signatures: dict[str, str]
    anchors: dict[str, tuple[Anchor, ...]]
    scale: float = 1.0

    def of(self, kept: Mapping[str, int]) -> int:
        """Nanoseconds of the engine that keeps this many units per group."""
        return self.full_ns - sum(int(self.saved(key, [count])[0]) for key, count in kept.items())

    def saved(self, key: str, counts: Sequence[int] | np.ndarray) -> np.ndarray:
        """Whole nanoseconds, int64 [counts], that a group saves by keeping this many units: multiples of one cell."""
        cell = max(int(self.base_ns * CELL), 1)
        curve = self._curves[self.signatures[key]]
        saved = np.array([curve(count) for count in np.asarray(counts)]) * self.scale
        return (saved // cell).astype(np.int64) * cell

    def fastest(self, least: Mapping[str, int]) -> int:
        """Nanoseconds of the engine with the fewest units that may stay: that of `floor`, less what it still has."""
        return max(self.floor_ns + self.of(least) - self.of(self.floor), 1)

    @cached_property
    def _curves(self) -> dict[str, _Savings]:
        units = {signature: self.units[key] for key, signature in self.signatures.items()}
        return {signature: _Savings(anchors, units[signature]) for signature, anchors in self.anchors.items()}


class _Savings:
    """Nanoseconds saved over units kept: never less where fewer units stay.

    Noise can make a smaller engine look slower, so the anchors are first fitted by isotonic regression, weighted by
    their intervals. Between them a piecewise cubic (PCHIP) is drawn: it is monotone wherever its points are, so that it
    cannot promise a saving that no anchor showed, as a spline through them could. A dropped sub-layer is a step of its
    own (its norm and reshapes stay or go with it) and is not interpolated to.
    """

    def __init__(self, anchors: Sequence[Anchor], units: int) -> None:
        positive = sorted((one for one in anchors if 0 < one.kept < units), key=lambda one: one.kept)
        widths = np.array([max(one.high_ns - one.low_ns, 1.0) for one in positive])
        saved = np.array([max(one.saved_ns, 0.0) for one in positive])
        # All units save nothing, and that is not measured but so by definition.
        if len(saved):
            saved = isotonic_regression(saved, weights=widths**-2.0, increasing=False).x
        counts, saved = np.array([one.kept for one in positive] + [units]), np.append(saved, 0.0)
        self._between = PchipInterpolator(counts, saved) if len(counts) > 1 else None
        self._fewest, self._most = int(counts[0]), float(saved[0])
        dropped = next((one.saved_ns for one in anchors if one.kept == 0), None)
        self._dropped = None if dropped is None else max(dropped, self._most)

    def __call__(self, count: int) -> float:
        if count == 0 and self._dropped is not None:
            return self._dropped
        if self._between is None or count <= self._fewest:
            return self._most
        return max(float(self._between(count)), 0.0)


def signatures(structure: Structure, costs: Costs) -> dict[str, str]:
    """Group key -> what groups of the same shapes share: kind, units, and what a unit costs at its place in the model.

    Raises InputError where a layer is between two groups: its latency depends on both counts, and a table holds one.
    """
    for term in costs.terms["macs"]:
        if len(term.groups) > 1:
            raise InputError(
                "a latency budget does not fit this model",
                f"a layer is between {' and '.join(term.groups)}: its latency depends on the kept units of both",
                "set prune.budget to macs, or remove one of these kinds from prune.units",
            )
    macs, params = costs.per_unit("macs", {}), costs.per_unit("params", {})
    return {
        group.key: f"{group.kind}{group.part}-{group.count}x{group.width}-{macs[group.key]}-{params[group.key]}"
        + ("-droppable" if group.sublayer is not None else "")
        for group in structure.groups
    }


def anchor_counts(units: int, step: int, least: int, anchors: int) -> list[int]:
    """Counts of one group to measure: the fewest that may stay, one step, and `anchors` between that and all."""
    fewest = min(step, units)
    shares = SHARES if anchors >= len(SHARES) else (0.5,) if anchors == 1 else (0.35, 0.7)
    between = {max(round(units * share / step) * step, fewest) for share in shares} if anchors > 0 else set()
    return sorted(count for count in {least, fewest, *between} if count < units)
