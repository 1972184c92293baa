"""Estimate the time, memory and disk space of a run's stages. Does not load torch.

Numbers of an earlier run are preferred: a run in the same folder, or of the same model in a sibling folder. Then come
those of a forecast (`stages.forecast`), if the model is on this machine. Otherwise lower bounds are derived from the
size of the model. Without a bound, the cost is unknown.
"""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import yaml

from optin_export.cli.dry_run.model_size import Size, size_of
from optin_export.errors import OptinError
from optin_export.recipe import AUTO, Recipe, engine_names
from optin_export.recipe.load import load_recipe
from optin_export.workdir.durations import recall
from optin_export.workdir.onnx_files import MAX_BYTES
from optin_export.workdir.run_directory import STAGES

if TYPE_CHECKING:
    from optin_export.stages.forecast import Forecast

#: As in `measure.latency`: minimum blocks of a measurement, seconds per engine in a block, and seconds of its warm-up.
BLOCKS, BLOCK_SECONDS, WARM_UP_SECONDS = 24, 0.12, 0.5
#: As in `scoring.sketch`: probes before it first asks whether the scores are stable.
FIRST_PROBES = 4
#: Forward and backward passes of one round of `repair.gauss_newton`: two models, the gradient and its probes.
GAUSS_NEWTON_PASSES = 2 + 2 * (1 + 4)
#: Maximum number of other runs that are searched for one of the same model.
MOST_SIBLINGS = 50
#: Size of a weight relative to float32.
_RELATIVE_SIZE = {"fp32": 1.0, "fp16": 0.5, "bf16": 0.5, "int8": 0.25, "fp8": 0.25}


@dataclass(frozen=True)
class StageCost:
    """Seconds and bytes of one stage. kind: whether they were measured in an earlier run, forecast from a forward and a
    backward pass of the model, or are a lower bound.

    memory_bytes: measured: the peak of the process during the stage; a bound: the weights that are in memory at the
    same time, without libraries and activations. basis: where the numbers come from.
    """

    stage: str
    kind: Literal["measured", "forecast", "at least", "unknown"]
    seconds: float | None
    memory_bytes: int | None
    basis: str

    def __str__(self) -> str:
        least = {"at least": "at least ", "forecast": "about "}.get(self.kind, "")
        seconds = "time not known" if self.seconds is None else f"{least}{_duration(self.seconds)}"
        memory = "memory not known" if self.memory_bytes is None else f"{least}{_bytes(self.memory_bytes)}"
        return f"{seconds}, {memory} ({self.basis})"

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class RunCost:
    """The cost of every stage, in order; a lower bound of what is written to disk; and the size of the model."""

    stages: tuple[StageCost, ...]
    disk_bytes: int | None
    size: Size | None

    @property
    def external_data(self) -> bool | None:
        """Whether the weights are too large for an ONNX file and get files of their own; None if unknown."""
        return None if self.size is None else 4 * self.size.parameters > MAX_BYTES - MAX_BYTES // 16

    @property
    def total(self) -> str:
        """The time of all stages whose time is known, and the largest peak; "" if scoring is only bounded."""
        known = {one.stage: one for one in self.stages if one.kind in ("measured", "forecast")}
        if not {"scoring", "surgery"} <= set(known):
            return ""
        seconds = sum(one.seconds or 0 for one in known.values())
        peak = max(one.memory_bytes or 0 for one in known.values())
        return f"in all about {_duration(seconds)} and {_bytes(peak)} at the peak"

    def to_json(self) -> dict[str, Any]:
        size = None if self.size is None else asdict(self.size)
        return {"disk_bytes": self.disk_bytes, "model": size, "external_data": self.external_data}

    def summary(self) -> str:
        if self.size is None:
            return "size of the model not known, because its weights are not on this machine"
        disk = "" if self.disk_bytes is None else f"; at least {_bytes(self.disk_bytes)} on disk"
        text = f"{self.size.parameters:,} parameters ({self.size.origin}){disk}"
        if self.external_data:
            text += "\nan ONNX file holds 2 GiB at most: the weights are written as external data, onnx/NAME.onnx.data"
        return text


def estimate_cost(recipe: Recipe, folder: Path, forecast: Forecast | None = None) -> RunCost:
    """Estimate the cost of a run of `recipe` in `folder`, as far as it is known."""
    measured, whose = _earlier_run(recipe, folder)
    size = size_of(recipe)
    seconds = _least_seconds(recipe, size)
    memory = {} if size is None else _weight_bytes(recipe, 4 * size.parameters)
    stages = []
    for stage in STAGES:
        if stage in measured:
            entry = measured[stage]
            stages.append(StageCost(stage, "measured", entry["seconds"], entry["peak_bytes"], whose))
        elif forecast is not None and stage in forecast.seconds:
            peak = forecast.peak_bytes.get(stage, memory.get(stage))
            more = forecast.more if stage == "search" else ""
            basis = f"from {forecast.timed}{more}"
            stages.append(StageCost(stage, "forecast", forecast.seconds[stage], peak, basis))
        elif stage in seconds or stage in memory:
            least, basis = seconds.get(stage, (None, ""))
            bases = [one for one in (basis, "weights alone" if stage in memory else "") if one]
            stages.append(StageCost(stage, "at least", least, memory.get(stage), "; ".join(bases)))
        else:
            stages.append(StageCost(stage, "unknown", None, None, "no earlier run"))
    disk = None if size is None else round(4 * size.parameters * _copies(recipe))
    return RunCost(tuple(stages), disk, size)


def _earlier_run(recipe: Recipe, folder: Path) -> tuple[dict[str, dict[str, Any]], str]:
    """Stage -> its cost in this folder, or in another run of the same model; and which run that was."""
    if known := recall(folder):
        same = _recipe_in(folder) == recipe
        return known, "measured in this folder" + ("" if same else ", with another recipe")
    try:
        siblings = sorted((path for path in folder.parent.iterdir() if path.is_dir()), key=lambda path: path.name)
    except OSError:
        return {}, ""
    for path in siblings[:MOST_SIBLINGS]:
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


def _least_kept(recipe: Recipe) -> float:
    """The minimum share of the parameters that the budget keeps; 0 if the budget does not determine it."""
    return recipe.budget.params or 0.0


def _weight_bytes(recipe: Recipe, base: int) -> dict[str, int]:
    """Stage -> bytes of weights in memory at once: the unpruned model (`base`), the pruned one, and engines."""
    both = round(base * (1 + _least_kept(recipe)))
    engines = _targets(recipe) * len(engine_names(recipe.export.precision)) // 2
    held = {"sources": base, "scoring": base, "curves": base, "search": base, "surgery": both, "export": both + base}
    return {**held, "engines": both, "measure": round(both + both * _RELATIVE_SIZE[recipe.export.precision] * engines)}


def _targets(recipe: Recipe) -> int:
    """Number of targets whose engines are built, with those of `engine: auto`."""
    return sum(len(AUTO) if target.engine == "auto" else 1 for target in recipe.targets)


def _copies(recipe: Recipe) -> float:
    """Size of the written files in multiples of the unpruned fp32 weights: model/, onnx/, engines/ and triton/."""
    kept, precision = _least_kept(recipe), recipe.export.precision
    graphs = (1 + kept) * (1 + (0.0 if precision == "fp32" else _RELATIVE_SIZE[precision]))
    return kept + graphs * (1 + _targets(recipe)) + ((1 + kept) if recipe.ship.triton else 0)


def _least_seconds(recipe: Recipe, size: Size | None) -> dict[str, tuple[float, str]]:
    """Stage -> (lower bound of seconds, its basis)."""
    arms = 3 if recipe.export.precision == "fp32" else 5
    settings = _targets(recipe) * len(recipe.export.batch)
    blocks = min(BLOCKS, recipe.measure.most_blocks or BLOCKS)
    latency = settings * arms * (blocks * BLOCK_SECONDS + WARM_UP_SECONDS)
    basis = f"latency: {settings} settings of {blocks} blocks, {arms} arms of {BLOCK_SECONDS} s, warm-up"
    found = {"measure": (latency, basis)}
    if size is None or size.macs is None:
        return found
    speed = _macs_per_second()
    for stage, passes in _passes(recipe).items():
        basis = (
            f"{passes:,} passes of a sample, {size.macs / 1e9:.3g} GMACs in dense layers, at {speed / 1e9:.0f} GMACs/s"
        )
        found[stage] = (passes * size.macs / speed, basis)
    return found


def _passes(recipe: Recipe) -> dict[str, int]:
    """Stage -> minimum number of forward passes of one sample; a backward pass counts as two."""
    prune, rows = recipe.prune, recipe.data.calibration.samples or 0
    scored = min(prune.score_samples, rows or prune.score_samples)
    probes = FIRST_PROBES if prune.probes == "auto" else prune.probes
    # With `auto`, convolutions may be scored without a pass; heads and neurons take these.
    sketched = prune.score in ("auto", "optin")
    found = {"scoring": scored * (1 + (2 * probes if sketched else 0)), "surgery": rows if prune.compensate else 0}
    if prune.compensate and prune.gauss_newton is True:
        found["surgery"] += GAUSS_NEWTON_PASSES * rows
    if recipe.tuning is not None and recipe.tuning.source is None:
        found["surgery"] += 3 * recipe.tuning.steps * recipe.tuning.batch
    return {stage: passes for stage, passes in found.items() if passes}


def _macs_per_second() -> float:
    """The speed of a large matrix product on this machine, which no model reaches."""
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
