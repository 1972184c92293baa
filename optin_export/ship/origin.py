"""A finished run as the source of a shipment: its files, its verdict, and where its model and data come from."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import yaml

from optin_export import engines
from optin_export.errors import GateError, InputError
from optin_export.measure import Gate, Measured, judge
from optin_export.recipe import Recipe, Target, engine_name, load_recipe
from optin_export.recipe.strict_yaml import parse_yaml
from optin_export.ship.manifest import is_as_written, read_manifest
from optin_export.workdir.files import MAX_TEXT, read_json, read_text, sha256_json

UNKNOWN = "unknown"


@dataclass(frozen=True)
class Origin:
    """A run folder and facts about the run. summary: the verdict's sentence, once the report is written."""

    folder: Path
    recipe: Recipe
    passed: bool
    summary: str | None
    environment: Mapping[str, Any]
    inputs: Mapping[str, str]

    @classmethod
    def from_run(cls, folder: Path, overrides: Sequence[str] = ()) -> Origin:
        """Open a finished run. overrides: `ship.a=b`; nothing else of a finished run can change.

        Raises InputError for anything else.
        """
        for override in overrides:
            if not override.startswith("ship."):
                raise InputError(
                    f"--set {override} is not a field of ship",
                    "the run is finished, so only its section ship can change",
                    "change the recipe and run it again",
                )
        if not (folder / "recipe.yaml").is_file():
            raise InputError(f"{folder} is not a run folder", "it has no recipe.yaml", "give the folder of a run")
        manifest = read_manifest(folder)
        recipe = load_recipe(folder / "recipe.yaml", overrides)
        # The report's own verdict is not trusted: the measurements are judged again.
        gates = judged_again(folder, recipe)
        return cls(
            folder,
            recipe,
            manifest.get("passed") is True and all(gate.passed for gate in gates),
            summary_of(gates),
            manifest.get("environment", {}),
            manifest.get("inputs", {}),
        )

    @property
    def identity(self) -> str:
        """The run that a shipped model belongs to: its name and a hash of its folder's path, which hides the path."""
        place = hashlib.sha256(os.fsencode(self.folder.resolve())).hexdigest()
        return f"{self.recipe.name} ({place[:16]})"

    @property
    def reference(self) -> Path:
        return self.folder / "measure" / "reference.safetensors"

    def target(self, engine: str) -> Target:
        """The first target of an engine. Raises InputError if the recipe has none."""
        for target in self.recipe.targets:
            if target.engine == engine:
                return target
        raise InputError(
            f"the run has no engine of {engine}",
            f"its targets are {', '.join(target.name for target in self.recipe.targets)}",
            f"add {{engine: {engine}}} to targets, or choose another ship.backend",
        )

    def graph(self, which: str) -> Path:
        """The ONNX graph that is shipped as 'base' or 'pruned'; the only place that chooses this file."""
        return self.folder / "onnx" / f"{engine_name(which, self.recipe.export.precision)}.onnx"

    def engine(self, which: str, target: Target) -> Path:
        """The engine file that is shipped as 'base' or 'pruned'."""
        return engines.artefact(self.folder, target, engine_name(which, self.recipe.export.precision))

    def check(self, files: list[Path], allow_failed: bool) -> None:
        """Raises GateError for a run that failed, InputError for files that do not match its manifest."""
        if not self.passed and not allow_failed:
            raise GateError(
                f"the run {self.recipe.name} failed its gates and is not shipped",
                self.summary or "a gate was missed",
                "see report.html; --allow-failed ships it all the same, and says so in the manifest",
            )
        known = read_manifest(self.folder)["files"]
        for path in files:
            name = path.relative_to(self.folder).as_posix()
            entry = known.get(name)
            if entry is None or not is_as_written(path, entry):
                raise InputError(
                    f"{path} is not the file that was measured",
                    "it is missing, or differs from the run's manifest.json",
                    "run the recipe again; it builds only what is missing",
                )

    def facts(self) -> dict[str, Any]:
        """The facts about its origin in the manifest of a shipped model."""
        recipe = self.recipe
        data = recipe.data
        return {
            "shipped_from": self.identity,
            "verdict": {"passed": self.passed, "summary": self.summary, "shipped_although_failed": not self.passed},
            "own_config": recipe.ship.config,
            "recipe": {"name": recipe.name, "sha256": sha256_json(recipe.model_dump(mode="json"))},
            "model": {
                "source": without_folders(recipe.model.source),
                "weights": without_folders(recipe.model.weights),
                "task": recipe.model.task,
                "license": recipe.ship.model_license or license_of(recipe.model.source),
            },
            "data": {
                "calibration": without_folders(data.calibration.source),
                "evaluation": without_folders(data.evaluation.source) if data.evaluation else None,
                "license": recipe.ship.data_license or UNKNOWN,
            },
            "inputs": dict(self.inputs),
            "seed": recipe.seed,
            "environment": dict(self.environment),
        }


def judged_again(folder: Path, recipe: Recipe) -> list[Gate]:
    """The gates of a finished run, from measure/ and the recipe. Raises InputError if its files are insufficient.

    For targets that only a cluster has, the counts of gates are taken from the report.
    """
    try:
        report = read_json(folder / "report.json")
        found = {name: read_json(folder / "measure" / f"{name}.json") for name in ("parity", "accuracy", "latency")}
        unmeasured = {one["target"]: one["unmeasured"] for one in report["engines"] if one["unmeasured"]}
        measured = Measured.from_json({**found, "unmeasured": unmeasured})
        budget, spent = recipe.budget, None
        if budget.kind in ("macs", "params"):
            spent = report[budget.kind]["pruned"] / report[budget.kind]["base"]
        macs = report["macs"]["pruned"] / report["macs"]["base"]
        gates = judge(recipe.gates, budget, spent, measured, macs=macs)
        if not recipe.here:
            gates = [gate for gate in gates if gate.name.startswith("budget.")]
        reported = {one["name"]: one for one in report["verdict"]["gates"]}
        for target in recipe.fleet:
            name = f"target.{target.name}"
            required, seen = float(reported[name]["required"]), reported[name]["measured"]
            passed = seen is not None and seen >= required > 0
            gates.append(Gate(name, "gate", ">=", required, seen, passed, "gates that hold on a node that has it"))
        return gates
    except (OSError, ValueError, KeyError, TypeError, AttributeError, ArithmeticError) as error:
        raise InputError(
            f"{folder} has no readable report.json and measurements",
            f"{type(error).__name__}: {error}"[:300],
            "run the recipe again",
        ) from None


def summary_of(gates: Sequence[Gate]) -> str:
    """Every gate in one sentence."""
    return "; ".join(
        f"{gate.name} {'not evaluated' if gate.measured is None else f'{gate.measured:.4g}'} "
        f"({gate.relation} {gate.required:g})"
        for gate in gates
    )


def without_folders(source: str) -> str:
    """`csv:/home/me/data/train.csv` -> `csv:train.csv`; hub names stay. For files that leave this machine."""
    prefix, separator, rest = source.rpartition(":/") if ":/" in source else ("", "", source)
    path = f"/{rest}" if separator else rest
    if not path.startswith("/"):
        return source
    file, colon, function = path.partition(".py:")
    name = f"{PurePosixPath(file).name}{colon}{function}" if colon else PurePosixPath(path).name
    return f"{prefix}:{name}" if prefix else name


def license_of(source: str) -> str:
    """The licence in the front matter of the model's README; 'unknown' without one.

    Nothing is downloaded: a hub model's README counts if it is in the local cache.
    """
    name = source.removeprefix("hf:")
    readme = Path(name) / "README.md"
    if source.startswith("hf:") and not readme.is_file():
        from huggingface_hub import try_to_load_from_cache

        try:
            found = try_to_load_from_cache(name, "README.md")
        except ValueError:  # not a hub name
            return UNKNOWN
        if not isinstance(found, str):
            return UNKNOWN
        readme = Path(found)
    try:
        _, front, _ = read_text(readme, MAX_TEXT).split("---\n", 2)
        value = parse_yaml(front)["license"]
    except (OSError, ValueError, KeyError, TypeError, yaml.YAMLError):
        return UNKNOWN
    return str(value)[:200]
