"""The engines that a target with `engine: auto` stands for, and the choice among them: the fastest that passes parity
and accuracy."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from optin_export import engines, measure
from optin_export.errors import EnvironmentLacks
from optin_export.export import converters
from optin_export.recipe import AUTO, ExportSection, Recipe, Target, engine_name

if TYPE_CHECKING:
    from optin_export.stages.context import RunContext

#: Blocks in which the candidates are timed.
BLOCKS = 16
#: The gates that a candidate has to pass, or the next one is taken.
_PASSES = ("parity", "accuracy_drop", "budget.accuracy_drop")


@dataclass(frozen=True)
class Candidates:
    """targets: the engines among which the run chooses. refused: the other ones by target name, with the reason."""

    targets: tuple[Target, ...]
    refused: Mapping[str, str]

    def without(self, target: Target, reason: str) -> Candidates:
        left = tuple(one for one in self.targets if one != target)
        return replace(self, targets=left, refused={**self.refused, target.name: reason})


def versions(target: Target, section: ExportSection) -> dict[str, str]:
    """Versions of the packages with which engines of a target are made here.

    Raises EnvironmentLacks if one is missing, or the CPU cannot run the precision.
    """
    found = engines.versions(target)
    reason = engines.lacks(target, section.precision)
    if reason is not None:
        raise EnvironmentLacks(
            f"engines of {target.name} cannot run here in {section.precision}", reason, "set another export.precision"
        )
    source = engines.source_of(Path(), target, engine_name("pruned", section.precision))
    return found | (converters(section, source) if source.suffix == ".xml" else {})


def expanded(recipe: Recipe) -> tuple[Recipe, Candidates | None]:
    """The recipe with the engines of this machine in the place of `engine: auto`; None if it names all its engines.

    Raises EnvironmentLacks if no engine can run.
    """
    auto = next((target for target in recipe.targets if target.engine == "auto"), None)
    if auto is None:
        return recipe, None
    able, refused = [], {}
    for engine in AUTO:
        target = auto.model_copy(update={"engine": engine})
        reason = _unable(target, recipe.export)
        if reason is None:
            able.append(target)
        else:
            refused[target.name] = reason
    if not able:
        why = "; ".join(f"{name}: {reason}" for name, reason in refused.items())
        raise EnvironmentLacks(f"no engine can run the target {auto.name}", why, "pip install 'optin-export[cpu]'")
    at = recipe.targets.index(auto)
    targets = (*recipe.targets[:at], *able, *recipe.targets[at + 1 :])
    return recipe.model_copy(update={"targets": targets}), Candidates(tuple(able), refused)


def resolved(recipe: Recipe, candidates: Candidates, chosen: Target) -> Recipe:
    """The expanded recipe with the chosen engine alone, and Triton's backend that runs it."""
    targets = tuple(one for one in recipe.targets if one == chosen or one not in candidates.targets)
    backend = recipe.ship.backend
    if backend in AUTO:
        own = chosen.engine == "onnxruntime" or (recipe.export.precision != "fp32" and not recipe.ship.ensemble)
        backend = chosen.engine if own else "python"  # type: ignore[assignment]
    ship = recipe.ship.model_copy(update={"backend": backend})
    return recipe.model_copy(update={"targets": targets, "ship": ship})


def choose(
    work: RunContext,
    candidates: Candidates,
    measured_of: Callable[[Sequence[Target]], measure.Measured],
    judged: Callable[[measure.Measured], Sequence[measure.Gate]],
) -> tuple[measure.Measured, list[dict[str, Any]]]:
    """Time the candidates' shipped engines interleaved, then measure one after the other, from the fastest on, until
    one passes parity and accuracy; if none does, the slowest is the run's.

    Returns its measurements, and facts about every candidate for the report (`CandidateResult`).
    """
    times = _times(work, candidates)
    order = sorted(candidates.targets, key=lambda target: _typical(times[target.name]))
    refused = dict(candidates.refused)
    for target in order:
        measured = measured_of(resolved(work.recipe, candidates, target).here)
        missed = [gate for gate in judged(measured) if not gate.passed and _decides(gate.name)]
        if not missed:
            break
        refused[target.name] = "; ".join(map(_words, missed))
    chosen = target
    for slower in order[order.index(chosen) + 1 :]:
        ratio = _typical(times[slower.name]) / _typical(times[chosen.name])
        refused[slower.name] = f"its calls take {ratio:.2f} times as long as those of {chosen.name}"
    names = [*(one.name for one in order), *candidates.refused]
    return measured, [
        {"target": name, "taken": name == chosen.name, "ms": times.get(name, {}), "reason": refused.get(name)}
        for name in names
    ]


def _unable(target: Target, section: ExportSection) -> str | None:
    reason = section.cannot(target.engine, target.device)
    if reason is not None:
        return reason
    try:
        versions(target, section)
    except EnvironmentLacks as error:
        return f"{error.why}: {error.fix}"
    return engines.unavailable(target)


def _times(work: RunContext, candidates: Candidates) -> dict[str, dict[str, float]]:
    """Median milliseconds of the pruned engines by target name and batch size."""
    times: dict[str, dict[str, float]] = {target.name: {} for target in candidates.targets}
    for batch in work.recipe.export.batch:
        built = {
            target.name: engines.load(engines.artefact(work.folder, target, work.shipped), target)
            for target in candidates.targets
        }
        inputs = {name: tensor.numpy() for name, tensor in work.sources.fixed(batch).items()}
        timed = measure.interleave(built, inputs, blocks=BLOCKS, seed=work.recipe.seed)
        for name in built:
            times[name][str(batch)] = timed.median(name).median
    return times


def _typical(times: Mapping[str, float]) -> float:
    """The geometric mean over batch sizes, in which each counts equally."""
    return float(np.exp(np.mean(np.log(list(times.values())))))


def _decides(gate: str) -> bool:
    return gate.startswith(_PASSES)


def _words(gate: measure.Gate) -> str:
    value = "not evaluated" if gate.measured is None else f"{gate.measured:.3g}"
    return f"{gate.name} {value}, required {gate.relation} {gate.required:g}"
