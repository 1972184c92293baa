"""`--dry-run`: what the stages will take, each with its basis. Loads no torch.

Measured before counts most: an earlier run in this folder, or another run of the same model beside it. Without one
there are lower bounds only, from the size of the model and what is certain to be computed; where there is none, nothing
is said. Nothing here is a promise.
"""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import yaml

from optin_export.cli.forecast.model_size import Size, size_of
from optin_export.errors import OptinError
from optin_export.recipe import Recipe, engine_names
from optin_export.recipe.load import load_recipe
from optin_export.workdir.durations import recall
from optin_export.workdir.onnx_files import MAX_BYTES
from optin_export.workdir.run_directory import STAGES

#: Those of `measure.latency`: its blocks at least, seconds of an arm of a block, and of an arm's warm-up.
BLOCKS, BLOCK_SECONDS, WARM_UP_SECONDS = 24, 0.12, 0.5
#: `scoring.sketch` looks at its stability after so many probes.
FIRST_PROBES = 4
#: Forward and backward passes of one round of `surgery.gauss_newton`: two models, the gradient and its probes.
GAUSS_NEWTON_PASSES = 2 + 2 * (1 + 4)
#: Runs beside this one that are looked at.
MOST_SIBLINGS = 50
Kind = Literal["measured", "at least", "unknown"]


@dataclass(frozen=True)
class Estimate:
    """Seconds and bytes of one stage. kind: whether they were measured in an earlier run, or are lower bounds.

    memory_bytes: measured: the most that the process held in the stage; else the weights that are held
    at once, without libraries and activations. basis: where the numbers come from, or why there are none.
    """

    stage: str
    kind: Kind
    seconds: float | None
    memory_bytes: int | None
    basis: str

    def __str__(self) -> str:
        least = "at least " if self.kind == "at least" else ""
        words = [
            "time not known" if self.seconds is None else f"{least}{_duration(self.seconds)}",
            "memory not known" if self.memory_bytes is None else f"{least}{_bytes(self.memory_bytes)}",
        ]
        return f"{', '.join(words)} ({self.basis})"

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Estimates:
    """Of every stage, in order; what will be written to disk, at least; and what the model's size was read from."""

    stages: tuple[Estimate, ...]
    disk_bytes: int | None
    size: Size | None

    @property
    def external_data(self) -> bool | None:
        """Whether the weights will lie beside the ONNX graphs, in files of their own; None where nothing is known."""
        return None if self.size is None else 4 * self.size.parameters > MAX_BYTES - MAX_BYTES // 16

    def to_json(self) -> dict[str, Any]:
        size = None if self.size is None else asdict(self.size)
        return {"disk_bytes": self.disk_bytes, "model": size, "external_data": self.external_data}

    def summary(self) -> str:
        if self.size is None:
            return "size of the model not known: its weights are not on this machine; no bounds from it"
        disk = "" if self.disk_bytes is None else f"; at least {_bytes(self.disk_bytes)} on disk"
        told = f"{self.size.parameters:,} parameters ({self.size.origin}){disk}"
        if self.external_data:
            told += (
                "\nmore than one ONNX file holds (2 GiB): the weights lie beside the graphs as external data, "
                "onnx/NAME.onnx.data"
            )
        return told


def estimate(recipe: Recipe, folder: Path) -> Estimates:
    """What a run of `recipe` in `folder` will take, as far as it can be known."""
    known, whose = _measured_before(recipe, folder)
    size = size_of(recipe)
    bounds = _seconds(recipe, size)
    kept = _kept(recipe)
    weights = {} if size is None else _weights(recipe, 4 * size.parameters, kept)
    stages = []
    for stage in STAGES:
        if stage in known:
            entry = known[stage]
            stages.append(Estimate(stage, "measured", entry["seconds"], entry["peak_bytes"], whose))
        elif stage in bounds or stage in weights:
            basis = "; ".join(
                part
                for part in (bounds[stage][1] if stage in bounds else "", "weights alone" if stage in weights else "")
                if part
            )
            seconds = bounds[stage][0] if stage in bounds else None
            stages.append(Estimate(stage, "at least", seconds, weights.get(stage), basis))
        else:
            stages.append(Estimate(stage, "unknown", None, None, "no earlier run to go by"))
    disk = None if size is None else round(4 * size.parameters * _copies(recipe, kept))
    return Estimates(tuple(stages), disk, size)


def _measured_before(recipe: Recipe, folder: Path) -> tuple[dict[str, dict[str, Any]], str]:
    """Stage -> what it took in the run folder, or in another run of the same model; and whose run that was."""
    if known := recall(folder):
        same = _recipe_in(folder) == recipe
        return known, "measured when last done in this folder" + ("" if same else ", by another recipe")
    try:
        beside = sorted((path for path in folder.parent.iterdir() if path.is_dir()), key=lambda path: path.name)
    except OSError:
        return {}, ""
    for path in beside[:MOST_SIBLINGS]:
        if known := recall(path):
            other = _recipe_in(path)
            if other is not None and other.model == recipe.model:
                return known, f"measured in {path.name}, another run of this model"
    return {}, ""


def _recipe_in(folder: Path) -> Recipe | None:
    try:
        return load_recipe(folder / "recipe.yaml")
    except (OptinError, OSError, yaml.YAMLError):
        return None


def _kept(recipe: Recipe) -> float:
    """The least share of the parameters that stays, where the budget says it; else 0."""
    return recipe.budget.params or 0.0


def _weights(recipe: Recipe, base: int, kept: float) -> dict[str, int]:
    """Bytes of float32 weights that are in memory at once: the unpruned model, the pruned one, and the engines."""
    both = round(base * (1 + kept))
    engines = len(recipe.targets) * len(engine_names(recipe.export.precision)) // 2
    held = {"sources": base, "scoring": base, "curves": base, "search": base, "surgery": both, "export": both + base}
    quarter = {"fp32": 1.0, "fp16": 0.5, "bf16": 0.5, "int8": 0.25, "fp8": 0.25}[recipe.export.precision]
    return {**held, "engines": both, "measure": round(both + both * quarter * engines)}


def _copies(recipe: Recipe, kept: float) -> float:
    """How many times the unpruned fp32 weights are written: model/, onnx/ and engines, and the server's models."""
    narrow = {"fp32": 0.0, "fp16": 0.5, "bf16": 0.5, "int8": 0.25, "fp8": 0.25}[recipe.export.precision]
    graphs = (1 + kept) * (1 + narrow)
    return kept + graphs * (1 + len(recipe.targets)) + ((1 + kept) if recipe.ship.triton else 0)


def _seconds(recipe: Recipe, size: Size | None) -> dict[str, tuple[float, str]]:
    """Stage -> (seconds at least, basis)."""
    arms = 3 if recipe.export.precision == "fp32" else 5
    settings = len(recipe.targets) * len(recipe.export.batch)
    clocked = settings * arms * (BLOCKS * BLOCK_SECONDS + WARM_UP_SECONDS)
    words = f"latency: {settings} settings of {BLOCKS} blocks, {arms} arms of {BLOCK_SECONDS} s, warm-up"
    found = {"measure": (clocked, words)}
    if size is None or size.macs is None:
        return found
    speed = _macs_per_second()
    for stage, passes in _passes(recipe).items():
        found[stage] = (
            passes * size.macs / speed,
            f"{passes:,} passes of a sample, {size.macs / 1e9:.3g} GMAC in dense layers, at {speed / 1e9:.0f} GMAC/s, "
            "a large product timed now",
        )
    return found


def _passes(recipe: Recipe) -> dict[str, int]:
    """Stage -> forward passes of one sample that are to be expected; a backward pass counts as two."""
    prune, rows = recipe.prune, recipe.data.calibration.samples or 0
    scored = min(prune.score_samples, rows or prune.score_samples)
    probes = FIRST_PROBES if prune.probes == "auto" else prune.probes
    # Of `auto` this is what heads and neurons take; convolutions may be scored without a pass.
    sketched = prune.score in ("auto", "optin")
    found = {"scoring": scored * (1 + (2 * probes if sketched else 0)), "surgery": rows}
    if prune.gauss_newton is True:
        found["surgery"] += GAUSS_NEWTON_PASSES * rows
    if not prune.compensate:
        found["surgery"] = 0
    if recipe.finetune is not None and recipe.finetune.source is None:
        found["surgery"] += 3 * recipe.finetune.steps * recipe.finetune.batch
    return {stage: passes for stage, passes in found.items() if passes}


def _macs_per_second() -> float:
    """How fast this machine multiplies large matrices, which is faster than any model: hence a lower bound of time."""
    import numpy as np

    side = 768
    left = np.ones((side, side), np.float32)
    fastest = float("inf")
    for _ in range(4):
        start = time.perf_counter()
        left @ left
        fastest = min(fastest, time.perf_counter() - start)
    return side**3 / fastest


def _duration(seconds: float) -> str:
    if seconds < 1:
        return f"{seconds:.2g} s"
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} min"


def _bytes(count: int) -> str:
    return f"{count / 2**20:,.0f} MiB" if count < 10 * 2**30 else f"{count / 2**30:,.1f} GiB"
