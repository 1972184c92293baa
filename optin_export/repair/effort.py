"""What loss curves and repair take, for forecasts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from optin_export.repair import gauss_newton, second_order, sensitivity
from optin_export.repair.curves import CALIBRATION_ROWS, counts_of
from optin_export.repair.few_rows import FEW, WIDE
from optin_export.repair.least_squares import DAMPINGS
from optin_export.repair.measured_points import is_measured, measured_at, thinned
from optin_export.repair.settings import RepairSettings
from optin_export.repair.token_schedule import STEPS, TRIALS
from optin_export.repair.token_schedule import THINNED as TOKENS_THINNED
from optin_export.repair.trial import TRIAL_ROWS
from optin_export.units import Effort, LayerSize, Structure, UnitGroup, later_share

#: Share of the products of a Gram matrix that are computed; the others are equal to them.
GRAM = 0.55


def sensitivity_effort(rows: int) -> Effort:
    """The weights of the least squares, from all calibration rows."""
    return Effort(graph=rows, backward=2 * sensitivity.PROBES * rows)


def curves_effort(
    structure: Structure, sizes: Mapping[str, LayerSize], settings: RepairSettings, calibration: int, scoring: int
) -> Effort:
    """calibration, scoring: numbers of rows, the latter among the former; sizes: of the layers that read units."""
    whole = is_measured(structure)
    total = Effort() if whole else Effort(graph=scoring, backward=2 * second_order.PROBES * scoring)
    grams = min(calibration - scoring or calibration, CALIBRATION_ROWS) if settings.repair else 0
    total += Effort(forward=grams)
    all_counts = {group.key: counts_of(group.count, 0) for group in structure.searched_groups}
    judged = scoring / thinned(structure, all_counts, scoring, calibration)
    for group in structure.searched_groups:
        counts = all_counts[group.key]
        total += Effort(forward=len(measured_at(structure, counts)) * judged * later_share(structure, group))
        for size in (sizes[path] for path in group.reads):
            weights = size.inputs * size.outputs
            if not whole:
                tried, probes = len(counts) - 1, 2 * second_order.PROBES
                products = min(tried * size.positions, probes * (size.positions + tried))
                total += Effort(multiply=products * scoring * weights)
            made = grams * size.positions
            if settings.repair and _are_few(made, size.inputs):
                each = made**3 / 3 + made * weights
                total += Effort(solve=made**2 * size.inputs + len(counts) * each)
            elif settings.repair:
                total += Effort(multiply=GRAM * made * size.inputs**2)
                total += Effort(solve=size.inputs**3 / 3 + (2 + len(counts) / 3) * size.inputs * weights)
    return total


def _are_few(rows: float, inputs: float) -> bool:
    """Whether rows are kept instead of a Gram matrix (see `few_rows`)."""
    return inputs >= WIDE and rows <= FEW * inputs


def system_bytes(size: LayerSize, rows: int) -> float:
    """Peak memory in bytes of refitting one layer to `rows` samples.

    In float64: Gram matrices, a Cholesky factor and a solution; or, for few rows, the rows and three matrices of the
    weight's size.
    """
    made = rows * size.positions
    if _are_few(made, size.inputs):
        return 8 * (3 * made * size.inputs + made**2 + 3 * size.inputs * size.outputs)
    return 4 * 8 * size.inputs**2


def probed_bytes(structure: Structure, sizes: Mapping[str, LayerSize]) -> float:
    """Bytes that one row takes between the backward passes of the curves and their products: what every layer reads,
    and the gradients of what it makes."""
    read = [sizes[path] for group in structure.searched_groups for path in group.reads]
    return sum(4 * size.positions * (size.inputs + 2 * second_order.PROBES * size.outputs) for size in read)


def repair_effort(
    structure: Structure, sizes: Mapping[str, LayerSize], settings: RepairSettings, rows: int, kept: float
) -> Effort:
    """sizes: of the layers that make or read units; kept: the share of the units that stays."""
    if not settings.repair:
        return Effort()
    each = len(structure.searched_groups) / max(len(structure.blocks), 1)
    # One pass of the unpruned model; of the smaller one, one for its blocks' outputs and one and a bit per group.
    total = Effort(forward=rows * (1 + kept * (1 + 1.1 * each)))
    for group in structure.groups:
        for inputs, outputs, positions in _systems(group, sizes, kept):
            square, both, made = inputs**2, inputs * outputs, rows * positions
            if _are_few(made, inputs):
                total += Effort(solve=(len(DAMPINGS) - 1) * (made**3 / 3 + made**2 * inputs + 3 * made * both))
                continue
            total += Effort(multiply=made * (GRAM * square + both))
            total += Effort(solve=(len(DAMPINGS) - 1) * (inputs**3 / 3 + 3 * inputs * both))
    if settings.gauss_newton:
        # Two models, the gradient, and the probes of the matrix, in every round.
        total += gauss_newton.ROUNDS * Effort(forward=2 * rows, graph=rows, backward=(1 + gauss_newton.PROBES) * rows)
    return total


def trial_effort(
    structure: Structure,
    sizes: Mapping[str, LayerSize],
    settings: RepairSettings,
    calibration: int,
    judged: int,
    kept: float,
) -> Effort:
    """A plan that is built, repaired on a few rows and judged on others, as the unpruned model is."""
    settings = replace(settings, gauss_newton=False)
    rows = min(calibration - judged or calibration, TRIAL_ROWS)
    return repair_effort(structure, sizes, settings, rows, kept) + Effort(forward=judged * (1 + kept))


def merging_effort(blocks: int, judged: int, built: Effort) -> Effort:
    """At most: the search for a number of merged tokens. judged: rows; built: of every plan that is built."""
    # The steps replay the blocks before; every number is distributed in two ways, and its plan is judged.
    steps = len(STEPS) * (blocks + 1) / 2 / TOKENS_THINNED
    return Effort(forward=judged * (1 + steps + 3 * (TRIALS - 1))) + (TRIALS - 1) * built


def _systems(group: UnitGroup, sizes: Mapping[str, LayerSize], kept: float) -> list[tuple[float, float, float]]:
    """(inputs, outputs, positions) of the linear systems of one group: its producers together, and each reader."""
    made = [sizes[one.path] for one in group.producers if one.path in sizes]
    found = [(sizes[path].inputs * kept, float(sizes[path].outputs), sizes[path].positions) for path in group.reads]
    if made:
        found.append((float(made[0].inputs), kept * sum(one.outputs for one in made), made[0].positions))
    return found
