"""Engines of trial models on one target: the latency table for a latency budget, and the engines of its plans.

The search receives the results as data (`search.LatencyTable`, `search.PlanLatency`).
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from optin_export import engines, measure, pruning, search
from optin_export.data import Sources
from optin_export.engines import Engine
from optin_export.errors import InputError
from optin_export.export import convert, export_onnx, export_program, weight_bits
from optin_export.models import TaskModel
from optin_export.progress import advance, phase, task
from optin_export.recipe import Budget, Target, engine_name
from optin_export.search import Anchor, LatencyRound, LatencyTable, Plan, PlanLatency
from optin_export.units import Costs, Structure, find_tokens

#: Blocks in which the engines of one signature are timed.
TABLE_BLOCKS = 16
#: Maximum plans of one search that are built and measured.
ROUNDS = 3
#: Share of the budget that a plan may leave unused before another round spends it.
SLACK = 0.02
#: (budget, table) -> the best plan within it.
PlanOf = Callable[[Budget, LatencyTable], Plan]


@dataclass(frozen=True)
class LatencyTrials:
    """Builds engines of models for one target in `folder`, in the same way as the shipped ones, and times them.

    merged: tokens that the shipped model merges in each block.
    """

    sources: Sources
    structure: Structure
    target: Target
    batch: int
    folder: Path
    merged: tuple[int, ...] = ()

    @property
    def sequence(self) -> int | None:
        recipe = self.sources.recipe
        return recipe.export.sequence if recipe.is_text else None

    def inputs(self) -> dict[str, np.ndarray]:
        return {name: tensor.numpy() for name, tensor in self.sources.fixed(self.batch).items()}

    def shaped(self, plan: Mapping[str, search.GroupPlan]) -> TaskModel:
        """The model with these units and merged tokens; not repaired, because only shapes matter for latency."""
        sources = self.sources
        dense, _ = pruning.rebuild(sources.model, self.structure, plan, sources.fixed(2))
        if any(self.merged):
            dense = pruning.insert_merging(dense, self.structure, find_tokens(sources.model), self.merged)
        return dense

    def first_units(self, counts: Mapping[str, int]) -> TaskModel:
        """The model that keeps this number of first units of each of these groups, and all units of the others."""
        return self.shaped(
            search.keep_first(
                {group.key: (group.count, counts.get(group.key, group.count)) for group in self.structure.groups}
            )
        )

    def engine(self, model: TaskModel) -> Engine:
        """The model's loaded engine in the recipe's precision; its files are deleted after loading."""
        try:
            return self.load(model, "trial")()
        finally:
            shutil.rmtree(self.folder / "trial", ignore_errors=True)

    def load(self, model: TaskModel, name: str) -> measure.Load:
        """Build the model's engine below `folder`/`name`, and return a function that loads it."""
        recipe, target, folder = self.sources.recipe, self.target, self.folder / name
        trial = engine_name("trial", recipe.export.precision)
        source, path = (of(folder, target, trial) for of in (engines.source_of, engines.artefact))
        sequence = None if recipe.tokens.merges else self.sequence
        export = export_program if target.engine == "torch" else export_onnx
        fp32 = engines.source_of(folder, target, "trial")
        export(model, self.sources.fixed(2), fp32, max_batch=max(recipe.export.batch), sequence=sequence)
        if source != fp32:
            # Scales from a few rows are enough: latency does not depend on them.
            rows = ({n: t.numpy() for n, t in batch.inputs.items()} for batch in self.sources.quantization[:1])
            convert(fp32, source, recipe.export, rows, weight_bits(recipe.export, recipe.targets, source))
        engines.build(source, target, path, self.sources.shapes())
        return partial(engines.load, path, target)

    def clear(self) -> None:
        """Delete everything that was built."""
        shutil.rmtree(self.folder, ignore_errors=True)


def measure_table(
    trials: LatencyTrials, costs: Costs, steps: Mapping[str, int], least: Mapping[str, int], seed: int
) -> LatencyTable:
    """Build and time the anchors of every signature, each interleaved with the unpruned engine.

    steps: group key -> counts are multiples of it. Raises InputError if the model has no such table.
    """
    signatures = search.signatures(trials.structure, costs)
    members: dict[str, list[str]] = {}
    for key, signature in signatures.items():
        members.setdefault(signature, []).append(key)
    between = max(search.MOST_ENGINES // len(members) - 2, 0)
    wanted = {
        signature: search.anchor_counts(costs.units[keys[0]], steps[keys[0]], least[keys[0]], between)
        for signature, keys in members.items()
    }
    floor = {key: wanted[signature][0] for signature, keys in members.items() for key in keys if wanted[signature]}
    floor |= {keys[-1]: steps[keys[-1]] for keys in members.values() if floor.get(keys[-1]) == 0 and len(keys) > 1}
    timings: dict[str, tuple[measure.Interleaved, dict[str, int]]] = {}
    phase("engines with fewer units", until=0.6)
    with task(sum(map(len, wanted.values()))):
        base = trials.engine(trials.sources.model)
        full = trials.engine(trials.first_units({})) if any(trials.merged) else base
        smallest = trials.engine(trials.first_units(floor))
        for signature, keys in members.items():
            built: dict[str, Engine] = {"base": base, "full": full, "floor": smallest}
            shared: dict[str, int] = {}
            for count in wanted[signature]:
                # One group keeps its sub-layer when the others drop theirs: a model without any might compute nothing.
                chosen = keys[:-1] if count == 0 and len(keys) > 1 else keys
                built[str(count)] = trials.engine(trials.first_units(dict.fromkeys(chosen, count)))
                shared[str(count)] = len(chosen)
                advance()
            timed = measure.interleave(built, trials.inputs(), blocks=TABLE_BLOCKS, seed=seed, mode=trials.target.mode)
            timings[signature] = timed, shared
    # Signatures are measured one after another, possibly at different clock rates, so savings by merging and by units
    # are shares of the unpruned engine in the same blocks.
    base_ns = 1e6 * float(np.median([timed.median("base").median for timed, _ in timings.values()]))
    merging, left = (
        float(np.median([timed.saved(name, "base", "base").median for timed, _ in timings.values()]))
        for name in ("full", "floor")
    )
    return LatencyTable(
        target=trials.target.name,
        batch=trials.batch,
        sequence=trials.sequence,
        base_ns=round(base_ns),
        full_ns=round(base_ns * (1 - merging) if any(trials.merged) else base_ns),
        floor_ns=round(base_ns * (1 - left)),
        floor=floor,
        units=dict(costs.units),
        signatures=signatures,
        anchors={
            signature: tuple(_anchor(timed, name, groups, base_ns) for name, groups in shared.items())
            for signature, (timed, shared) in timings.items()
        },
    )


def _anchor(timed: measure.Interleaved, name: str, groups: int, base_ns: float) -> Anchor:
    saved = timed.saved(name, "full", "base")
    share = base_ns / groups
    return Anchor(kept=int(name), saved_ns=saved.median * share, low_ns=saved.low * share, high_ns=saved.high * share)


def choose(trials: LatencyTrials, table: LatencyTable, budget: Budget, plan_of: PlanOf, seed: int) -> Plan:
    """The plan with the least loss among those whose built and measured engines meet the budget.

    If an engine misses the budget, or leaves more than SLACK of it, the table's savings are scaled by measured over
    predicted savings and the search repeats, ROUNDS times at most. If no engine meets the budget, the fastest plan is
    taken, and the gate will fail. Raises InputError if the table has no plan within the budget.
    """
    try:
        phase("building and timing plans", until=1.0)
        with task(ROUNDS):
            return _choose(trials, table, budget, plan_of, seed)
    finally:
        trials.clear()


def _choose(trials: LatencyTrials, table: LatencyTable, budget: Budget, plan_of: PlanOf, seed: int) -> Plan:
    base = trials.load(trials.sources.model, "base")
    corrected, aimed = table, budget
    plans: list[Plan] = []
    rounds: list[LatencyRound] = []
    for _ in range(ROUNDS):
        try:
            plan = plan_of(aimed, corrected)
        except InputError:
            if not rounds:
                raise
            break
        if any(plan.groups == old.groups for old in plans):
            break
        found = _measure(trials, base, plan, seed)
        plans.append(plan)
        rounds.append(_round(found, plan, corrected, aimed, budget))
        advance()
        if rounds[-1].met and _spare(rounds[-1], budget) <= SLACK:
            break
        corrected, aimed = _correct(table, plan, rounds[-1], budget)
    chosen = _best(plans, rounds)
    plan, one = plans[chosen], rounds[chosen]
    kept = {key: len(group.kept) for key, group in plan.groups.items()}
    found_out = PlanLatency(
        target=table.target,
        batch=table.batch,
        sequence=table.sequence,
        base_ms=table.base_ns / 1e6,
        predicted_ms=table.of(kept) / 1e6,
        measured_ms=one.measured_ms,
        chosen=chosen,
        rounds=tuple(rounds),
    )
    return plan.model_copy(update={"budget": budget.named, "latency": found_out})


def _measure(trials: LatencyTrials, base: measure.Load, plan: Plan, seed: int) -> measure.Latency:
    settings = measure.LatencySettings(
        trials.target.name,
        trials.batch,
        trials.sequence,
        seed,
        mode=trials.target.mode,
        other_work=trials.sources.recipe.gates.most_other_work,
    )
    return measure.measure_latency(base, trials.load(trials.shaped(plan.groups), "pruned"), trials.inputs(), settings)


def _round(found: measure.Latency, plan: Plan, table: LatencyTable, aimed: Budget, budget: Budget) -> LatencyRound:
    interval = measure.latency_of(found.samples["pruned"], found.rounds)
    kept = {key: len(group.kept) for key, group in plan.groups.items()}
    met = (
        found.judged_speedup.ci_low >= budget.speedup
        if budget.speedup is not None
        else interval.high * 1e6 <= budget.nanoseconds(table.base_ns)
    )
    return LatencyRound(
        scale=table.scale,
        aim_ms=aimed.nanoseconds(table.base_ns) / 1e6,
        predicted_ms=table.of(kept) / 1e6,
        base_ms=found.base_ms.p50,
        measured_ms=interval.median,
        measured_low=interval.low,
        measured_high=interval.high,
        speedup=found.speedup.median,
        speedup_low=found.speedup.ci_low,
        speedup_high=found.speedup.ci_high,
        macs=plan.predicted.macs / plan.base.macs,
        met=met,
    )


def _spare(one: LatencyRound, budget: Budget) -> float:
    """The share of the budget that a round's engine leaves, by the end of its interval that the gate uses."""
    if budget.speedup is not None:
        return one.speedup_low / budget.speedup - 1
    assert budget.latency_ms is not None
    return 1 - one.measured_high / budget.latency_ms


def _correct(table: LatencyTable, plan: Plan, one: LatencyRound, budget: Budget) -> tuple[LatencyTable, Budget]:
    """The table that would have predicted the measured latency, and the latency to aim at with it.

    Only savings are scaled, because the unpruned engine is measured, not predicted. Everything is in shares of the
    unpruned engine, whose latency may differ from that in the table. The aim is below the budget by the distance from
    the interval's median to its end.
    """
    kept = {key: len(group.kept) for key, group in plan.groups.items()}
    promised = table.full_ns - table.of(kept)
    measured = table.full_ns - table.base_ns / one.speedup
    # A predicted saving of nearly zero is no evidence about the rest of the table.
    scale = float(np.clip(measured / promised, 0.25, 4.0)) if promised > 0.01 * table.base_ns else 1.0
    if budget.speedup is not None:
        share = one.speedup_low / one.speedup / budget.speedup
    else:
        assert budget.latency_ms is not None
        share = budget.latency_ms / one.base_ms * one.measured_ms / one.measured_high
    aim = Budget(latency_ms=share * table.base_ns / 1e6)
    return table.model_copy(update={"scale": scale}), aim


def _best(plans: list[Plan], rounds: list[LatencyRound]) -> int:
    """The plan with the most predicted accuracy among those that met the budget; otherwise the fastest."""
    met = [index for index, one in enumerate(rounds) if one.met]
    if not met:
        return max(range(len(rounds)), key=lambda index: rounds[index].speedup_low)

    def value(index: int) -> float:
        loss = plans[index].predicted_loss
        return plans[index].score_kept if loss is None else -loss

    return max(met, key=value)
