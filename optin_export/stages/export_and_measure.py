"""Stages `export`, `engines` and `measure`: ONNX files, engines, what was measured on them, and the verdict."""

from __future__ import annotations

import time
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.numpy import save_file

from optin_export import engines, measure
from optin_export.export import convert, converters, export_onnx, export_program
from optin_export.models import as_function
from optin_export.recipe import MODELS, Target, engine_name, model_of, precision_of
from optin_export.report import fleet_gates
from optin_export.stages.context import FILES, Facts, RunContext
from optin_export.stages.results import MeasureResult
from optin_export.workdir.files import atomic_path, read_json, sha256_file, write_json
from optin_export.workdir.onnx_files import graph_files, sha256_graph

#: Rows of the reference at least.
REFERENCE_ROWS = 16
#: Into how many parts the progress of one engine's build is divided.
PARTS = 100
#: Axis of the classes in a task's output, where it is not the last; None: its output is no choice.
CLASSES = {"feature-extraction": None, "image-feature-extraction": None, "image-segmentation": 1}


def export_models(work: RunContext, facts: Facts) -> dict[str, Any]:
    """Write onnx/base.onnx and onnx/pruned.onnx, and both in the recipe's precision, e.g. onnx/base.int8.onnx."""
    section = work.recipe.export
    origin = {
        "base": {key: work.digest[key] for key in ("weights", "architecture")},
        "pruned": {name: sha256_file(work.folder / "model" / name) for name in FILES},
    }
    exported = {}
    for done, which in enumerate(MODELS):
        path = work.onnx(which)

        def run(which: str = which, path: Path = path) -> dict[str, Any]:
            model = work.sources.model if which == "base" else work.dense
            # Two rows at least: a batch of one would be frozen into the graph.
            inputs = work.sources.fixed(2)
            sequence = section.sequence if work.recipe.is_text and not work.recipe.tokens.merges else None
            return export_onnx(model, inputs, path, max_batch=max(section.batch), sequence=sequence).to_json()

        inputs = {
            **origin[which],
            "export": {"batch": section.batch, "sequence": section.sequence, "merges": work.recipe.tokens.merges},
            "inputs": {name: list(tensor.shape) for name, tensor in work.sources.fixed(2).items()},
            "torch": torch.__version__,
        }
        exported[which] = work.cache.step("export", f"export.{which}", inputs, partial(graph_files, path), run)
        if any(target.engine == "torch" for target in work.recipe.targets):
            exported[f"program.{which}"] = _export_program(work, which, inputs)
        work.tick(done + 1, len(work.engine_names))
    if section.precision != "fp32":
        for done, which in enumerate(MODELS):
            exported[engine_name(which, section.precision)] = _convert(work, which)
            work.tick(len(MODELS) + done + 1, len(work.engine_names))
    return exported


def _export_program(work: RunContext, which: str, inputs: dict[str, Any]) -> dict[str, Any]:
    """Write onnx/<which>.pt2, what torch's own engine is made of."""
    path, section = work.onnx(which).with_suffix(".pt2"), work.recipe.export

    def run() -> dict[str, Any]:
        model = work.sources.model if which == "base" else work.dense
        sequence = section.sequence if work.recipe.is_text and not work.recipe.tokens.merges else None
        return asdict(
            export_program(model, work.sources.fixed(2), path, max_batch=max(section.batch), sequence=sequence)
        )

    return work.cache.step("export", f"export.program.{which}", inputs, [path], run)


def _convert(work: RunContext, which: str) -> dict[str, Any]:
    """Write one model in the recipe's precision, from its fp32 graph and, for scales, calibration rows."""
    section, name = work.recipe.export, engine_name(which, work.recipe.export.precision)
    path = work.onnx(name)

    def run() -> dict[str, Any]:
        rows = ({n: t.numpy() for n, t in batch.inputs.items()} for batch in work.sources.quantization)
        return convert(work.onnx(which), path, section, rows).to_json()

    inputs = {
        "onnx": sha256_graph(work.onnx(which)),
        "export": section.model_dump(mode="json", exclude={"batch"}),
        "digest": work.calibration_digest,
        "seed": work.recipe.seed,
        "versions": converters(section),
    }
    return work.cache.step("export", f"export.{name}", inputs, partial(graph_files, path), run)


def build_engines(work: RunContext, facts: Facts) -> list[dict[str, Any]]:
    """Build both models, in every precision, for every target; says why an engine cannot run here, if so."""
    built: list[dict[str, Any]] = []
    total = len(work.recipe.here) * len(work.engine_names)

    def tick(step: int, steps: int) -> None:
        """A builder's own steps are a part of the engine's share of the stage."""
        work.tick(len(built) * PARTS + PARTS * step // max(steps, 1), total * PARTS)

    for target in work.recipe.here:
        for which in work.engine_names:
            path = engines.artefact(work.folder, target, which)
            source = engines.source_of(work.folder, target, which)

            def run(target: Target = target, source: Path = source, path: Path = path) -> dict[str, Any]:
                start = time.perf_counter()
                properties = engines.build(source, target, path, work.sources.shapes(), tick)
                return {"build_seconds": round(time.perf_counter() - start, 3), "facts": properties}

            inputs = {
                "source": sha256_graph(source),
                "target": target.model_dump(),
                "versions": engines.versions(target),
                "shapes": work.sources.shapes(),
                "cpu": work.environment["cpu"],
            }
            written = partial(engines.files, path, target)
            result = work.cache.step("engines", f"engines.{target.name}.{which}", inputs, written, run)
            reason = engines.unavailable(target)
            named = {"target": target.name, "model": model_of(which), "precision": precision_of(which)}
            built.append({**named, **result, "unmeasured": reason})
            tick(0, 1)
    return built


def measure_engines(work: RunContext, facts: Facts) -> MeasureResult:
    """Measure the engines that run here into `measure/`, with what the torch models answer, and judge the run."""
    _write_reference(work)
    paths = {name: work.folder / "measure" / f"{name}.json" for name in ("parity", "accuracy", "latency")}
    export, evaluation = work.recipe.export, work.recipe.data.evaluation
    reasons = {target.name: engines.unavailable(target) for target in work.recipe.here}
    unmeasured = {name: reason for name, reason in reasons.items() if reason is not None}

    def run() -> dict[str, Any]:
        with work.around.quiet():
            return run_quietly()

    def run_quietly() -> dict[str, Any]:
        measured = measure.measure_engines(
            {
                target.name: {
                    which: partial(engines.load, engines.artefact(work.folder, target, which), target)
                    for which in work.engine_names
                }
                for target in work.recipe.here
                if target.name not in unmeasured
            },
            {"base": as_function(work.sources.model), "pruned": as_function(work.dense)},
            lambda batch, distinct: {n: t.numpy() for n, t in work.sources.fixed(batch, distinct).items()},
            work.sources.evaluation(),
            batches=export.batch,
            sequence=export.sequence if work.recipe.is_text else None,
            seed=work.recipe.seed,
            tick=work.tick,
            judged={target.name: target.mode for target in work.recipe.here},
            precision=export.precision,
            classes=CLASSES.get(work.recipe.model.task, -1),
            other_work=work.recipe.gates.most_other_work,
        ).to_json()
        for name, path in paths.items():
            write_json(path, measured[name])
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
    }
    work.cache.step("measure", "measure", inputs, list(paths.values()), run)
    found = {name: read_json(path) for name, path in paths.items()}
    measured = measure.Measured.from_json({**found, "unmeasured": unmeasured})
    return MeasureResult(measured, tuple(_judge(work, facts, measured)))


def _judge(work: RunContext, facts: Facts, measured: measure.Measured) -> list[measure.Gate]:
    """Every gate of the run, from what the stages found."""
    budget = work.recipe.budget
    fleet = fleet_gates(work.recipe, work.folder)
    if budget.kind == "latency":
        found = work.plan.latency
        assert found is not None
        promised = found.base_ms / found.predicted_ms if budget.speedup is not None else found.predicted_ms
        return measure.judge(work.recipe.gates, budget, None, measured, promised, _macs_left(work, facts)) + fleet
    spent = facts["surgery"][budget.kind] / work.costs.whole(budget.kind)
    judged = measure.judge(work.recipe.gates, budget, spent, measured, macs=_macs_left(work, facts))
    if not work.recipe.here:
        # Nothing is measured here: what the nodes found is all there is, beside what can be counted.
        judged = [gate for gate in judged if gate.name.startswith("budget.")]
    return judged + fleet


def _macs_left(work: RunContext, facts: Facts) -> float:
    """Share of the unpruned model's MACs that the pruned model has."""
    return float(facts["surgery"]["macs"] / work.costs.whole("macs"))


def _write_reference(work: RunContext) -> None:
    """measure/reference.safetensors: real rows at the shipped shape, and what both torch models make of them.

    `input.NAME` [rows, ...] and `output.base`, `output.pruned` [rows, ...] float32; row i of every tensor belongs
    together. With it, engines on another machine and servers are checked without the models' sources.
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
