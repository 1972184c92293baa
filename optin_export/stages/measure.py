"""Stage `measure`: measurements of the engines that run on this machine, and the verdict."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from optin_export import engines, measure
from optin_export.models import as_function, class_axis, in_float64
from optin_export.recipe import Target
from optin_export.report import fleet_gates
from optin_export.report.schema import CandidateResult
from optin_export.search import Plan
from optin_export.stages import choice
from optin_export.stages.context import FILES, RunContext
from optin_export.stages.results import MeasureResult, PruneResult
from optin_export.workdir.files import atomic_path, read_json, sha256_file, write_json, write_text
from optin_export.workdir.onnx_files import sha256_graph

#: Minimum rows of the reference.
REFERENCE_ROWS = 16


def measure_engines(work: RunContext, plan: Plan, pruned: PruneResult) -> MeasureResult:
    """Measure the engines that run here, write results and the torch models' reference to `measure/`, judge the run."""
    _write_reference(work)
    candidates = work.candidates
    names = ("parity", "accuracy", "latency", *(("candidates",) if candidates is not None else ()))
    paths = {name: work.folder / "measure" / f"{name}.json" for name in names}
    export, evaluation = work.recipe.export, work.recipe.data.evaluation
    reasons = {target.name: engines.unavailable(target) for target in work.recipe.here}
    unmeasured = {name: reason for name, reason in reasons.items() if reason is not None}

    def run() -> dict[str, Any]:
        with work.around.quiet():
            return run_quietly()

    def run_quietly() -> dict[str, Any]:
        def measured_of(targets: Sequence[Target]) -> measure.Measured:
            return _measured(work, [target for target in targets if target.name not in unmeasured])

        if candidates is None:
            results = measured_of(work.recipe.here).to_json()
        else:
            judged = partial(_judge, work, plan, pruned)
            measured, facts = choice.choose(work, candidates, measured_of, judged)
            results = {**measured.to_json(), "candidates": facts}
        for name, path in paths.items():
            write_json(path, results[name])
        return {}

    built = [engines.artefact(work.folder, target, which) for target in work.recipe.here for which in work.engine_names]
    inputs = {
        "unmeasured": unmeasured,
        "engines": {path.relative_to(work.folder).as_posix(): sha256_graph(path) for path in built},
        "digest": work.digest,
        "export": export.model_dump(mode="json"),
        "metric": (evaluation.metric, evaluation.ignore) if evaluation else None,
        "seed": work.recipe.seed,
        "cpu": work.environment["cpu"],
        "modes": [target.mode for target in work.recipe.here],
        "other_work": work.recipe.gates.most_other_work,
        "measure": work.recipe.measure.model_dump(mode="json"),
        **({} if candidates is None else {"chosen_by": work.recipe.gates.model_dump(mode="json")}),
    }
    work.cache.step("measure", "measure", inputs, list(paths.values()), run)
    found = {name: read_json(path) for name, path in paths.items()}
    measured = measure.Measured.from_json({**found, "unmeasured": unmeasured})
    considered = tuple(CandidateResult(**one) for one in found.get("candidates", ()))
    if candidates is not None:
        taken = next(one.target for one in considered if one.taken)
        chosen = next(target for target in candidates.targets if target.name == taken)
        work.recipe = choice.resolved(work.recipe, candidates, chosen)
        write_text(work.folder / "recipe.yaml", work.recipe.to_yaml())
    return MeasureResult(measured, tuple(_judge(work, plan, pruned, measured)), considered)


def _measured(work: RunContext, targets: Sequence[Target]) -> measure.Measured:
    """Parity, accuracy and latency of the engines of some targets."""
    export = work.recipe.export
    return measure.measure_engines(
        {
            target.name: {
                which: partial(engines.load, engines.artefact(work.folder, target, which), target)
                for which in work.engine_names
            }
            for target in targets
        },
        {"base": as_function(work.sources.model), "pruned": as_function(work.dense)},
        lambda batch, distinct: {n: t.numpy() for n, t in work.sources.fixed(batch, distinct).items()},
        work.sources.evaluation(),
        measure.MeasureSettings(
            batches=export.batch,
            sequence=export.sequence if work.recipe.is_text else None,
            seed=work.recipe.seed,
            short=work.recipe.is_text and not work.recipe.tokens.merges,
            judged={target.name: target.mode for target in targets},
            precision=export.precision,
            classes=class_axis(work.sources.model),
            other_work=work.recipe.gates.most_other_work,
            blocks=work.recipe.measure.most_blocks,
            seconds=work.recipe.measure.seconds,
        ),
        {"base": in_float64(work.sources.model), "pruned": in_float64(work.dense)},
    )


def _judge(work: RunContext, plan: Plan, pruned: PruneResult, measured: measure.Measured) -> list[measure.Gate]:
    """Every gate of the run, from the stages' results."""
    recipe, budget = work.recipe, work.recipe.budget
    fleet, macs = fleet_gates(recipe, work.folder), pruned.macs / work.costs.whole("macs")
    if budget.kind == "latency":
        found = plan.latency
        assert found is not None
        promised = found.base_ms / found.predicted_ms if budget.speedup is not None else found.predicted_ms
        return measure.judge(recipe.gates, budget, None, measured, promised, macs) + fleet
    spent = {"macs": pruned.macs, "params": pruned.params}[budget.kind] / work.costs.whole(budget.kind)
    judged = measure.judge(recipe.gates, budget, spent, measured, macs=macs)
    if not recipe.here:
        # Nothing is measured here: there are only the nodes' results and what can be counted.
        judged = [gate for gate in judged if gate.name.startswith("budget.")]
    return judged + fleet


def _write_reference(work: RunContext) -> None:
    """Write measure/reference.safetensors: real rows at the shipped shape, and both torch models' outputs for them.

    `input.NAME` [rows, ...] and `output.base`, `output.pruned` [rows, ...] float32; row i is the same sample in every
    tensor. Engines on another machine and servers are checked against it without the models' sources.
    """
    path, count = work.folder / "measure" / "reference.safetensors", max(*work.recipe.export.batch, REFERENCE_ROWS)

    def run() -> dict[str, Any]:
        rows = {name: tensor.numpy() for name, tensor in work.sources.fixed(count).items()}
        tensors = {f"input.{name}": array for name, array in rows.items()}
        for which, model in (("base", work.sources.model), ("pruned", work.dense)):
            function = as_function(model)
            parts = [
                function({name: array[start : start + REFERENCE_ROWS] for name, array in rows.items()})
                for start in range(0, count, REFERENCE_ROWS)
            ]
            tensors[f"output.{which}"] = np.concatenate(parts)
        with atomic_path(path) as temporary:
            save_file({name: np.ascontiguousarray(array) for name, array in sorted(tensors.items())}, temporary)
        return {"rows": count}

    inputs = {
        "digest": work.calibration_digest,
        "model": {name: sha256_file(work.folder / "model" / name) for name in FILES},
        "shapes": work.sources.shapes(),
        "rows": count,
    }
    work.cache.step("repair", "measure.reference", inputs, [path], run)
