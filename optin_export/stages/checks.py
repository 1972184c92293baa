"""The checks at the start of a run, in this order; `preflight` runs the same checks without weights."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

from optin_export import engines, search, ship
from optin_export.errors import EnvironmentLacks, InputError
from optin_export.models import device_of
from optin_export.report import found_by
from optin_export.stages import choice
from optin_export.stages.context import RunContext
from optin_export.stages.coverage import coverage_notes, with_refusals
from optin_export.units import CostKind

Check = Callable[[RunContext], str]


def engines_load(work: RunContext) -> str:
    """Check the packages and the precision of every target that is built here, and put engines in the place of `auto`.

    Raises EnvironmentLacks.
    """
    if work.candidates is None:
        work.recipe, work.candidates = choice.expanded(work.recipe)
    found: dict[str, str] = {}
    for target in work.recipe.here:
        found |= choice.versions(target, work.recipe.export)
    return ", ".join(f"{name} {version}" for name, version in found.items())


def sources_load(work: RunContext) -> str:
    """Load the model and the data, which all later checks need."""
    sources = work.sources
    for text in sources.warnings:
        work.cache.warn(text)
    rows = f"{len(sources.calibration_examples)} calibration rows"
    if sources.evaluation_examples is not None:
        rows += f", {len(sources.evaluation_examples)} evaluation rows"
    return f"{rows}, which {type(sources.model.model).__name__} takes"


def placement_fits(work: RunContext) -> str:
    """Check the recipe's device or device_map."""
    sources, placement = work.sources, work.placement
    device = device_of(placement.device) if placement.device_map is None else None
    if sources.loaded.looked_up and device is None:
        placement.places(sources.model)
    elif not sources.loaded.looked_up:
        placement.check(sources.model, sources.fixed(1))
    if device is None:
        return "model.device_map fits the model"
    return "" if device.type == "cpu" else f"scoring and repair run on {device}"


def triton_is_there(work: RunContext) -> str:
    """Check Triton's client, if the recipe ships for Triton."""
    if not work.recipe.ship.triton:
        return ""
    ship.check_tools()
    section, forms_batches = work.recipe.ship, work.recipe.ship.backend != "openvino"
    if section.config:
        ship.check_own(section.config, max(work.recipe.export.batch) if forms_batches else 0)
    return "found"


def units_are_there(work: RunContext) -> str:
    """Check that units of the recipe's kinds can be removed from the model."""
    structure = work.structure
    counts = Counter[str]()
    for group in structure.groups:
        counts[group.kind] += group.count
    if structure.attentions:
        counts["dimensions of queries and keys"] = sum(one.count for one in structure.attentions)
    units = ", ".join(f"{count:,} {kind}" for kind, count in counts.items())
    where = ""
    if work.sources.loaded.looked_up and any(group.found for group in structure.groups):
        where = " on random weights (a run measures again on the real ones)"
    return f"{found_by(structure.family)}{where}: {len(structure.blocks)} blocks, {units}"


def budget_is_reachable(work: RunContext) -> str:
    """Check that the costs can be measured, and that the model with the fewest allowed units meets the budget."""
    budget, costs = work.recipe.budget, work.costs
    for note in coverage_notes(work.sources.model, work.structure, costs, work.least, work.sources.fixed(1)):
        work.cache.warn(note)
    try:
        search.check_budget(costs, budget, work.least)
    except InputError as error:
        raise with_refusals(error, work.structure.refused) from None
    kind: CostKind = "params" if budget.kind == "params" else "macs"
    whole = costs.whole(kind)
    words = f"{whole / 1e6:.3g} million parameters" if kind == "params" else f"{whole / 1e9:.3g} GMACs a sample"
    return f"{words}, of which a share of {costs.of(kind, work.least) / whole:.4f} stays at least"


def latency_can_be_searched(work: RunContext) -> str:
    """For a latency budget, check that the target can be timed here and that the model has a latency table."""
    if work.recipe.budget.kind != "latency":
        return ""
    target = work.recipe.budget_target
    reason = engines.unavailable(target)
    if reason is not None:
        raise EnvironmentLacks(
            f"a latency budget cannot be searched on {target.name}",
            reason,
            "run on a machine that has it, name another target in prune.budget.target, or set prune.budget.macs",
        )
    search.signatures(work.structure, work.costs)
    return f"measured on {target.name}"


#: Name and check. Each raises InputError or EnvironmentLacks, or returns a text with its findings, possibly "".
CHECKS: tuple[tuple[str, Check], ...] = (
    ("engines", engines_load),
    ("model and data", sources_load),
    ("placement", placement_fits),
    ("triton client", triton_is_there),
    ("units", units_are_there),
    ("budget", budget_is_reachable),
    ("latency", latency_can_be_searched),
)
