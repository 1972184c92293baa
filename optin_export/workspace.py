"""The stages over one run folder. Each method takes what lies in the folder, writes its result there, and returns facts
about it as JSON; the order is not known here (see `pipeline`)."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors.numpy import load_file, save_file

from optin_export import engines, measure, scoring, search, ship, surgery
from optin_export.environment import describe
from optin_export.export import export_onnx
from optin_export.families import Costs, Structure, count_macs, count_params, find_structure
from optin_export.files import atomic_path, read_json, sha256_file, write_json, write_text
from optin_export.ledger import Ledger
from optin_export.planning import choose
from optin_export.recipe import Budget, Recipe, Target
from optin_export.report import Report, Size, StageResult, compose, head_repair, prunings, render_html
from optin_export.report.schema import Pruning, Tried
from optin_export.sources import Sources, TaskModel, as_function, load_sources
from optin_export.steps import fine_tune_step, ship_step

MODELS = ("base", "pruned")
#: Images of the calibration data on which the report shows what was merged.
SHOWN = 4
Facts = dict[str, Any]
Tick = Callable[[int, int], None]


class Workspace:
    """One recipe, its run folder, and what has been loaded so far."""

    def __init__(self, recipe: Recipe, folder: Path, force: bool, tick: Tick) -> None:
        self.recipe, self.folder, self.tick = recipe, folder, tick
        self.ledger = Ledger(folder, force, self._forget_conclusions)

    # What several stages need, loaded on first use only: a run that is reused whole loads no pruned model.

    @cached_property
    def sources(self) -> Sources:
        return load_sources(self.recipe)

    @cached_property
    def digest(self) -> dict[str, str]:
        return self.sources.digest()

    @cached_property
    def structure(self) -> Structure:
        prune = self.recipe.prune
        return find_structure(self.sources.model, prune.coupled, prune.units)

    @cached_property
    def scheduled(self) -> tuple[tuple[int, ...], Costs]:
        """Tokens merged per block as the recipe says (none yet if the search decides), and what units cost then."""
        return surgery.scheduled(self.sources.model, self.structure, self.recipe.tokens, self.sources.fixed(1))

    @property
    def costs(self) -> Costs:
        return self.scheduled[1]

    @cached_property
    def least(self) -> dict[str, int]:
        """Units that have to stay in each group: none where the sub-layer can go as a whole, else one step."""
        align = self.recipe.prune.align
        return {
            group.key: 0 if group.sublayer else min(group.step(align), group.count) for group in self.structure.groups
        }

    @cached_property
    def environment(self) -> dict[str, Any]:
        return describe()

    @cached_property
    def dense(self) -> TaskModel:
        return surgery.load_model(self.folder / "model", trust_python=True)  # the recipe named that file itself

    @cached_property
    def plan(self) -> search.Plan:
        return search.Plan.model_validate_json((self.folder / "plan" / "plan.json").read_text(encoding="utf-8"))

    def _forget_conclusions(self) -> None:
        """Something is about to change: a verdict and a shipped repository of before no longer hold."""
        for name in ("report.json", "report.html", "manifest.json"):
            (self.folder / name).unlink(missing_ok=True)
        shutil.rmtree(self.folder / "triton", ignore_errors=True)

    def load(self, facts: Facts) -> None:
        """Load and check everything that can be checked before hours of work and before anything is written."""
        for target in self.recipe.targets:
            engines.versions(target)
        if self.recipe.ship.triton:
            ship.check_tools()
        search.check_budget(self.costs, self.recipe.prune.budget, self.least)
        write_text(self.folder / "recipe.yaml", self.recipe.to_yaml())

    def score(self, facts: Facts) -> dict[str, Any]:
        prune, path = self.recipe.prune, self.folder / "scores" / "scores.safetensors"
        wanted = prune.model_dump(mode="json", exclude={"budget", "allocation", "compensate", "align", "curve_samples"})

        def work() -> dict[str, Any]:
            sources = self.sources
            scores = scoring.score(sources.model, self.structure, sources.scoring, prune, self.recipe.seed, self.tick)
            with atomic_path(path) as temporary:
                save_file(dict(sorted(scores.values.items())), temporary)
            return scores.info

        inputs = {**self._digest_for_calibration(), "prune": wanted, "seed": self.recipe.seed}
        info = self.ledger.step("scoring", "scoring", inputs, [path], work)
        if prune.allocation == "joint":
            self._measure_curves(path)
        return info

    def _measure_curves(self, scores: Path) -> None:
        """What keeping k units of each group costs, for the search; made with the repair's means, so by `surgery`."""
        path, prune = self.folder / "scores" / "curves.safetensors", self.recipe.prune

        def work() -> dict[str, Any]:
            sources = self.sources
            curves = surgery.loss_curves(
                sources.model,
                self.structure,
                load_file(scores),
                sources.calibration,
                sources.curves,
                least=self.least,
                temperature=prune.temperature,
                weights=self._sensitivities,
                seed=self.recipe.seed,
                tick=self.tick,
            )
            with atomic_path(path) as temporary:
                save_file(dict(sorted(curves.items())), temporary)
            return {}

        inputs = {
            **self._digest_for_calibration(),
            "scores": sha256_file(scores),
            "temperature": prune.temperature,
            "curve_samples": prune.curve_samples,
            "seed": self.recipe.seed,
        }
        self.ledger.step("surgery", "scoring.curves", inputs, [path], work)

    def find_plan(self, facts: Facts) -> dict[str, Any]:
        path = self.folder / "plan" / "plan.json"
        scores_path, curves_path = (self.folder / "scores" / f"{name}.safetensors" for name in ("scores", "curves"))
        prune = self.recipe.prune
        joint = prune.allocation == "joint"
        align = {group.key: group.step(prune.align) for group in self.structure.groups}

        def work() -> dict[str, Any]:
            scores = load_file(scores_path)
            curves = surgery.combined(load_file(curves_path), self.sources.model.output_kind) if joint else None

            def plan_of(budget: Budget, costs: Costs) -> search.Plan:
                found = search.find_plan(scores, costs, budget, align, self.least, curves)
                return found.model_copy(update={"merged": self.scheduled[0]})

            def built(plan: search.Plan) -> TaskModel:
                return self._operation(plan, lambda done, total: None).dense

            plan, tried = choose(self.sources, self.structure, self.costs, self.least, plan_of, built, self.tick)
            write_text(path, plan.model_dump_json(indent=2) + "\n")
            return tried

        inputs: dict[str, Any] = {
            "scores": sha256_file(scores_path),
            "curves": sha256_file(curves_path) if joint else None,
            "costs": self.costs.to_json(),
            "budget": prune.budget.model_dump(),
            "align": align,
            "least": self.least,
            "merged": self.scheduled[0],
        }
        if prune.budget.accuracy_drop is not None or self.recipe.tokens.keep == "auto":
            inputs |= {"digest": self.digest, "compensate": prune.compensate, "seed": self.recipe.seed}
            return self.ledger.step("measure", "search.accuracy", inputs, [path], work)
        return self.ledger.step("search", "search", inputs, [path], work)

    def _operation(self, plan: search.Plan, tick: Tick) -> surgery.Operation:
        sources, prune = self.sources, self.recipe.prune
        return surgery.operate(
            sources.model,
            self.structure,
            plan,
            sources.calibration if prune.compensate else (),
            sources.fixed(2),
            repair=prune.compensate,
            weights=self._sensitivities if prune.compensate else None,
            seed=self.recipe.seed,
            tick=tick,
        )

    @cached_property
    def _sensitivities(self) -> surgery.Weights:
        return surgery.sensitivities(self.sources.model, self.structure, self.sources.calibration, self.recipe.seed)

    def operate(self, facts: Facts) -> dict[str, Any]:
        tuned, prune = self.recipe.finetune is not None, self.recipe.prune
        folder = self.folder / ("repaired" if tuned else "model")

        def work() -> dict[str, Any]:
            sources = self.sources
            inputs, operation = sources.fixed(2), self._operation(self.plan, self.tick)
            surgery.save_model(
                folder, operation.dense, sources.loaded.architecture, self.structure.family, self.plan, inputs
            )
            surgery.save_places(folder / "places.safetensors", operation.dense, sources.fixed(SHOWN))
            one = sources.fixed(1)
            size = {"macs": count_macs(operation.dense, one), "params": count_params(operation.dense)}
            return {**operation.to_json(), **size}

        inputs = {
            **self._digest_for_calibration(),
            "plan": sha256_file(self.folder / "plan" / "plan.json"),
            "compensate": prune.compensate,
            "folder": folder.name,
            "seed": self.recipe.seed,
        }
        written = [folder / "architecture.json", folder / "model.safetensors"]
        done = self.ledger.step("surgery", "surgery", inputs, written, work)
        if tuned:
            return {**done, "finetuned": fine_tune_step(self, SHOWN)}
        shutil.rmtree(self.folder / "repaired", ignore_errors=True)
        return done

    def export_models(self, facts: Facts) -> dict[str, Any]:
        section = self.recipe.export
        origin = {
            "base": {key: self.digest[key] for key in ("weights", "architecture")},
            "pruned": {
                name: sha256_file(self.folder / "model" / name) for name in ("architecture.json", "model.safetensors")
            },
        }
        exported = {}
        for done, which in enumerate(MODELS):
            path = self._onnx(which)

            def work(which: str = which, path: Path = path) -> dict[str, Any]:
                model = self.sources.model if which == "base" else self.dense
                # Two rows at least: a batch of one would be frozen into the graph.
                inputs = self.sources.fixed(2)
                sequence = section.sequence if self.recipe.is_text and not self.recipe.tokens.merges else None
                return export_onnx(model, inputs, path, max_batch=max(section.batch), sequence=sequence).to_json()

            inputs = {
                **origin[which],
                "export": {**section.model_dump(mode="json"), "merges": self.recipe.tokens.merges},
                "inputs": {name: list(tensor.shape) for name, tensor in self.sources.fixed(2).items()},
                "torch": torch.__version__,
            }
            exported[which] = self.ledger.step("export", f"export.{which}", inputs, [path], work)
            self.tick(done + 1, len(MODELS))
        return exported

    def build_engines(self, facts: Facts) -> list[dict[str, Any]]:
        built = []
        for target in self.recipe.targets:
            for which in MODELS:
                path = engines.artefact(self.folder, target, which)

                def work(target: Target = target, which: str = which, path: Path = path) -> dict[str, Any]:
                    start = time.perf_counter()
                    properties = engines.build(self._onnx(which), target, path, self.sources.shapes(), self.tick)
                    return {"build_seconds": round(time.perf_counter() - start, 3), "facts": properties}

                inputs = {
                    "onnx": sha256_file(self._onnx(which)),
                    "target": target.model_dump(),
                    "versions": engines.versions(target),
                    "shapes": self.sources.shapes(),
                    "cpu": self.environment["cpu"],
                }
                written = engines.files(path, target)
                result = self.ledger.step("engines", f"engines.{target.name}.{which}", inputs, written, work)
                reason = engines.unavailable(target)
                built.append({"target": target.name, "model": which, **result, "unmeasured": reason})
        return built

    def measure_engines(self, facts: Facts) -> dict[str, Any]:
        paths = {name: self.folder / "measure" / f"{name}.json" for name in ("parity", "accuracy", "latency")}
        export, evaluation = self.recipe.export, self.recipe.data.evaluation
        reasons = {target.name: engines.unavailable(target) for target in self.recipe.targets}
        unmeasured = {name: reason for name, reason in reasons.items() if reason is not None}

        def work() -> dict[str, Any]:
            measured = measure.measure_engines(
                {
                    target.name: {
                        which: engines.load(engines.artefact(self.folder, target, which), target) for which in MODELS
                    }
                    for target in self.recipe.targets
                    if target.name not in unmeasured
                },
                {"base": as_function(self.sources.model), "pruned": as_function(self.dense)},
                lambda batch, distinct: {n: t.numpy() for n, t in self.sources.fixed(batch, distinct).items()},
                self.sources.evaluation(),
                batches=export.batch,
                sequence=export.sequence if self.recipe.is_text else None,
                seed=self.recipe.seed,
                tick=self.tick,
            ).to_json()
            for name, path in paths.items():
                write_json(path, measured[name])
            return {}

        built = [engines.artefact(self.folder, target, which) for target in self.recipe.targets for which in MODELS]
        inputs = {
            "unmeasured": unmeasured,
            "engines": {path.relative_to(self.folder).as_posix(): sha256_file(path) for path in built},
            "digest": self.digest,
            "export": export.model_dump(mode="json"),
            "metric": (evaluation.metric, evaluation.ignore) if evaluation else None,
            "seed": self.recipe.seed,
            "cpu": self.environment["cpu"],
        }
        self.ledger.step("measure", "measure", inputs, list(paths.values()), work)
        return {**{name: read_json(path) for name, path in paths.items()}, "unmeasured": unmeasured}

    def _gates(self, facts: dict[str, Any]) -> list[measure.Gate]:
        budget = self.recipe.prune.budget
        spent = facts["surgery"][budget.kind] / self.costs.whole(budget.kind)
        return measure.judge(self.recipe.gates, budget, spent, measure.Measured.from_json(facts["measure"]))

    def ship_run(self, facts: Facts) -> None:
        ship_step(self, all(gate.passed for gate in self._gates(facts)))

    def write_report(self, facts: Facts, stages: Sequence[StageResult]) -> Report:
        operated = facts["surgery"]
        macs, params = (
            Size(base=base, pruned=operated[kind], ratio=operated[kind] / base)
            for kind, base in ((kind, self.costs.whole(kind)) for kind in ("macs", "params"))
        )
        scores = load_file(self.folder / "scores" / "scores.safetensors")
        report = compose(
            name=self.recipe.name,
            model={"source": self.recipe.model.source, "task": self.recipe.model.task},
            gates=self._gates(facts),
            macs=macs,
            params=params,
            measured=measure.Measured.from_json(facts["measure"]),
            pruning=Pruning(
                family=self.structure.family,
                method=self.recipe.prune.score,
                info=facts["scoring"],
                budget=dict(self.plan.budget),
                tried=tuple(Tried(macs=macs, drop=drop) for macs, drop in facts["search"].get("tried", ())),
                compensated=bool(self.recipe.prune.compensate),
                masked_difference=operated["masked_difference"],
                optimality_gap=self.plan.optimality_gap,
                merged=self.plan.merged,
                groups=prunings(self.structure, self.plan, scores, operated["repairs"]),
                head=head_repair(operated["repairs"]),
                finetuned=operated.get("finetuned"),
            ),
            engines=facts["engines"],
            stages=stages,
            environment=self.environment,
        )
        write_text(self.folder / "report.json", report.model_dump_json(indent=2) + "\n")
        write_text(self.folder / "report.html", render_html(report, self.folder))
        return report

    def _digest_for_calibration(self) -> dict[str, str]:
        return {key: value for key, value in self.digest.items() if key not in ("evaluation", "finetune")}

    def _onnx(self, which: str) -> Path:
        return self.folder / "onnx" / f"{which}.onnx"
