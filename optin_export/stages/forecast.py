"""Forecast the time and memory of a run from one forward and one backward pass of the model on this machine.

The passes are timed on a few calibration rows, for ten seconds at most. Every stage is then counted in passes of rows,
multiply-adds of Gram matrices and solutions of linear systems. What the recipe leaves open (the probes of
`probes: auto`, the units that the search removes, how much other work disturbs the measurement) is assumed as runs
usually have it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

from optin_export import repair, scoring
from optin_export.data import Batch
from optin_export.errors import OptinError
from optin_export.models import Inputs, no_downloads, passes_in
from optin_export.recipe import FULL_BLOCKS, MOST_BLOCKS, Recipe
from optin_export.stages.accuracy_search import can_merge_if_needed
from optin_export.stages.context import RunContext
from optin_export.units import Effort, LayerSize, Structure, get_layer, get_weight, layer_outputs, layer_sizes
from optin_export.workdir import disk_offload
from optin_export.workdir.files import read_json, sha256_json, write_json
from optin_export.workdir.peak_memory import forget_peak, peak_bytes

NAME = ".stages/forecast.json"
#: Maximum seconds of all timed passes together, as far as one row of data allows.
SECONDS = 8.0
#: Passes of each kind, of which the fastest counts, unless the first one takes long.
REPEATS = 3
#: Side of the matrices whose product and factor are timed.
SIDE = 768
#: Seconds for the export of one graph: at least, and for each of the model's modules.
EXPORT_SECONDS, EXPORT_SECONDS_PER_MODULE = 3.0, 0.05
#: Seconds of latency measurement for each engine and setting: blocks and warm-up.
LATENCY_SECONDS = 4.0
#: Share of the passes for curves and weights of rows that gains by a shorter precision: sums over rows do not.
ESTIMATES = 0.5
#: Counts of a loss curve.
CANDIDATES = 13


def duration(seconds: float) -> str:
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


@dataclass(frozen=True)
class Speed:
    """Seconds on this machine: of a forward pass, of one that a backward pass can follow, and of a backward pass to all
    layers that make or read units, for one calibration row; of a multiply-add in float32, and in float64 solutions.

    row_bytes: memory of a pass with its graph for one row. held_bytes: memory of the process without it. positions:
    layer -> outputs for one row without their features. rows: rows of data that were timed at once. reduced: the time
    of passes with gradients in the precision of the scores, as a share of that in the model's own.
    """

    forward: float
    graph: float
    backward: float
    multiply: float
    solve: float
    row_bytes: float
    held_bytes: float
    positions: Mapping[str, float]
    rows: int
    reduced: float = 1.0

    def seconds(self, effort: Effort, *, estimates: float = 0.0) -> float:
        """estimates: share of the passes with gradients that gains by the precision of the scores."""
        gain = 1 - estimates * (1 - self.reduced)
        return (
            effort.forward * self.forward
            + gain * (effort.graph * self.graph + effort.backward * self.backward)
            + effort.multiply * self.multiply
            + effort.solve * self.solve
        )


@dataclass(frozen=True)
class Forecast:
    """Stage -> seconds, and bytes at the peak, as far as they can be forecast; and what was timed.

    merging: seconds at most that the search takes in addition, should units alone lose too much and it merge tokens;
    0: it merges none, or `seconds` has them.
    """

    seconds: Mapping[str, float]
    peak_bytes: Mapping[str, int]
    timed: str
    merging: float = 0.0

    @property
    def total(self) -> float:
        return sum(self.seconds.values())

    def __str__(self) -> str:
        stages = ", ".join(f"{stage} {duration(value)}" for stage, value in self.seconds.items())
        peak = max(self.peak_bytes.values(), default=0) / 2**30
        return f"{duration(self.total)} and {peak:.1f} GiB ({stages}; from {self.timed}){self.more}"

    @property
    def more(self) -> str:
        """What the search may take in addition, after a semicolon; "" for nothing."""
        if not self.merging:
            return ""
        return f"; up to {duration(self.merging)} more, if units alone lose too much and the search merges tokens"


def forecast(work: RunContext) -> Forecast:
    """Time a forward and a backward pass of the loaded model, and forecast the stages of a first run."""
    recipe, sources, structure = work.recipe, work.sources, work.structure
    speed = measure_speed(work)
    sizes = layer_sizes(sources.model, speed.positions, sorted(_layers(work)))
    rows, settings = len(sources.calibration_examples), work.repair_settings
    scored = sum(len(batch.rows) for batch in sources.scoring)
    methods = scoring.methods(structure, recipe.prune)
    efforts = {"scoring": scoring.effort(structure, recipe.prune, methods, scored)}
    weights = repair.sensitivity_effort(rows) if settings.repair else Effort()
    if recipe.prune.allocation == "joint":
        curves = sum(len(batch.rows) for batch in sources.curves)
        efforts["curves"] = weights + repair.curves_effort(structure, sizes, settings, rows, curves)
        weights = Effort()
    kept = recipe.budget.macs or recipe.budget.params or 0.5
    efforts["surgery"] = weights + repair.repair_effort(structure, sizes, settings, rows, kept)
    judged, blocks, merging = sum(len(batch.rows) for batch in sources.curves), len(structure.blocks), Effort()
    if recipe.tokens.keep == "auto" and not unforeseen_search(recipe):
        efforts["search"] = repair.merging_effort(blocks, judged, efforts["surgery"])
    elif not unforeseen_search(recipe):
        efforts["search"] = repair.trial_effort(structure, sizes, settings, rows, judged, kept)
        if can_merge_if_needed(sources, structure):
            merging = repair.merging_effort(blocks, judged, efforts["search"])
    if recipe.tuning is not None and recipe.tuning.source is None:
        steps = recipe.tuning.steps * recipe.tuning.batch
        efforts["surgery"] += Effort(forward=steps, graph=kept * steps, backward=2 * kept * steps)
    shares = {**dict.fromkeys(efforts, ESTIMATES), "scoring": 1.0}
    if recipe.tuning is not None or settings.gauss_newton:
        shares["surgery"] = 0.0  # its gradients change weights
    seconds = {stage: speed.seconds(effort, estimates=shares[stage]) for stage, effort in efforts.items()}
    seconds |= _export_and_measure(work, speed, kept)
    return Forecast(
        {stage: round(value, 1) for stage, value in seconds.items()},
        _peaks(work, speed, sizes),
        f"a forward and a backward pass of {speed.rows} rows at a time",
        round(speed.seconds(merging), 1),
    )


def forecast_of(recipe: Recipe) -> Forecast | None:
    """The forecast of a recipe whose model and data are on this machine; loads both. None if that is not possible."""
    try:
        with no_downloads():
            work = RunContext(recipe, Path(), False)
            return forecast(work)
    except (OptinError, RuntimeError, MemoryError):
        return None


def unforeseen(recipe: Recipe) -> list[str]:
    """Stages that can take long and that no forecast covers."""
    builds = any(target.engine in ("tensorrt", "tensorrt-rtx") for target in recipe.targets)
    return [*(["search"] if unforeseen_search(recipe) else []), *(["engines"] if builds else [])]


def unforeseen_search(recipe: Recipe) -> bool:
    return recipe.budget.kind == "latency" or recipe.budget.accuracy_drop is not None


def remember_forecast(work: RunContext) -> Forecast | None:
    """Forecast a first run and keep the result in its folder; None if the model cannot be timed."""
    try:
        found = forecast(work)
    except (RuntimeError, MemoryError):  # the stage that runs the model says why
        return None
    write_json(work.folder / NAME, {**asdict(found), "key": _key(work)})
    return found


def recall_forecast(work: RunContext) -> Forecast | None:
    """The forecast in the run folder, if it is of the same recipe."""
    try:
        found = read_json(work.folder / NAME)
        if found["key"] == _key(work):
            return Forecast(found["seconds"], found["peak_bytes"], found["timed"], found.get("merging", 0.0))
    except (OSError, ValueError, KeyError, TypeError):
        pass
    return None


def _key(work: RunContext) -> str:
    return sha256_json(work.recipe.model_dump(mode="json", exclude={"name", "gates", "ship"}))


def measure_speed(work: RunContext) -> Speed:
    """Time passes of a short, a middle and a long batch of the calibration rows (they are ordered by length)."""
    model, structure, batches = work.sources.model, work.structure, list(work.sources.calibration)
    paths = sorted(_layers(work))
    middle = batches[len(batches) // 2]
    with work.placement(model), structure.gradients():
        alone = _part(middle, 1)
        _passes(work, alone, paths)  # the first passes prepare kernels
        rows = max(
            1, min(len(middle.rows), int(SECONDS / (3 * REPEATS * max(sum(_fastest(work, alone, paths)), 1e-6))))
        )
        chosen = [batches[0], middle, batches[-1]]
        counted = forget_peak()
        held = (peak_bytes() or 0) if counted else 0
        found = [_fastest(work, _part(batch, rows), paths) for batch in chosen]
        peak = (peak_bytes() or held) if counted else held
        reduced = _reduced(work, _part(middle, rows), paths, found[1])
        with torch.no_grad(), layer_outputs(model, paths, structure.rewritten) as outputs:
            model(**_part(middle, rows))
    counts = [min(rows, len(batch.rows)) for batch in chosen]
    # Simpson's rule over the rows between the shortest and the longest.
    parts = [(weight / 6 / count, times) for weight, count, times in zip((1, 4, 1), counts, found, strict=True)]
    forward, graph, backward = (sum(weight * times[term] for weight, times in parts) for term in range(3))
    positions = {path: _positions(work, path, calls) / counts[1] for path, calls in outputs.items()}
    memory = (peak - held) / counts[-1], held
    return Speed(forward, graph, backward, *_algebra(), *memory, positions, rows, reduced)


def _reduced(work: RunContext, inputs: Inputs, paths: Sequence[str], own: tuple[float, float, float]) -> float:
    """Time of a pass with gradients in the precision of the scores, as a share of `own`."""
    if (dtype := work.scored_in) is None:
        return 1.0
    with passes_in(work.sources.model, dtype):
        _passes(work, inputs, paths)  # prepares kernels
        return sum(_fastest(work, inputs, paths)[1:]) / sum(own[1:])


def _fastest(work: RunContext, inputs: Inputs, paths: Sequence[str]) -> tuple[float, float, float]:
    """Of several passes, since other work on the machine can hold one up for a hundred times as long."""
    times = [_passes(work, inputs, paths)]
    while len(times) < REPEATS and sum(map(sum, times)) < SECONDS / 8:
        times.append(_passes(work, inputs, paths))
    forward, graph, backward = (min(some) for some in zip(*times, strict=True))
    return forward, graph, backward


def _passes(work: RunContext, inputs: Inputs, paths: Sequence[str]) -> tuple[float, float, float]:
    """Seconds of a forward pass, of one with its graph, and of a backward pass to the outputs of these layers."""
    model, times = work.sources.model, [_now()]
    with torch.no_grad():
        model(**inputs)
    times.append(_now())
    with repair.graph(model), layer_outputs(model, paths, work.structure.rewritten) as outputs:
        output = model(**inputs)
        times.append(_now())
        every = [one for calls in outputs.values() for one in calls if one.requires_grad]
        torch.autograd.grad(output.float().square().sum(), every, allow_unused=True)
    times.append(_now())
    forward, graph, backward = (after - before for before, after in pairwise(times))
    return forward, graph, backward


def _now() -> float:
    """Seconds by the clock, once a GPU has done what it was given."""
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        torch.cuda.synchronize()
    return time.perf_counter()


def _part(batch: Batch, rows: int) -> Inputs:
    """The last rows of a batch."""
    return {name: value[-rows:] for name, value in batch.inputs.items()}


def _layers(work: RunContext) -> set[str]:
    groups = work.structure.groups
    paths = {path for group in groups for path in group.reads}
    return paths | {producer.path for group in groups for producer in group.producers}


def _positions(work: RunContext, path: str, calls: Sequence[torch.Tensor]) -> float:
    return sum(one.numel() for one in calls) / max(1, len(get_weight(get_layer(work.sources.model, path))))


def _algebra() -> tuple[float, float]:
    """Seconds of a multiply-add in a float32 product, and in a float64 Cholesky factor with its solutions."""
    square = torch.randn(SIDE, SIDE)
    exact = (square @ square.T / SIDE + torch.eye(SIDE)).double()
    multiply = min(_seconds(lambda: square @ square) for _ in range(3)) / SIDE**3
    solve = min(_seconds(lambda: torch.cholesky_solve(exact, torch.linalg.cholesky(exact))) for _ in range(3))
    return multiply, solve / (SIDE**3 / 3 + SIDE**3)


def _seconds(run: Callable[[], Any]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def _export_and_measure(work: RunContext, speed: Speed, kept: float) -> dict[str, float]:
    """Export, engines and measurement: mostly constants of the tools, and passes of the evaluation rows."""
    recipe, model = work.recipe, work.sources.model
    modules = sum(1 for _ in model.modules())
    export = 2 * (EXPORT_SECONDS + EXPORT_SECONDS_PER_MODULE * modules)
    pairs = 1 if recipe.export.precision == "fp32" else 2
    settings = len(recipe.targets) * len(recipe.export.batch)
    arms = 1 + 2 * pairs
    blocks = min(recipe.measure.most_blocks or FULL_BLOCKS, MOST_BLOCKS)
    latency = settings * arms * LATENCY_SECONDS * blocks / FULL_BLOCKS
    examples = work.sources.evaluation_examples
    rows = (0 if examples is None else len(examples)) * len(recipe.targets) * pairs
    return {"export": export, "measure": latency + rows * (1 + kept) * speed.forward}


def _peaks(work: RunContext, speed: Speed, sizes: Mapping[str, LayerSize]) -> dict[str, int]:
    """Bytes of the process at each stage's peak: the autograd graph of one batch, and stored tensors."""
    sources, structure = work.sources, work.structure
    weights = sum(tensor.numel() * tensor.element_size() for tensor in sources.model.parameters())

    def graph(batches: Sequence[Batch]) -> float:
        return max((len(batch.rows) for batch in batches), default=0) * speed.row_bytes

    changes = 0
    for group in structure.searched_groups:
        changes += sum(2 * CANDIDATES * sizes[path].inputs * sizes[path].outputs for path in group.reads)
    probed = max((len(batch.rows) for batch in sources.curves), default=0) * repair.probed_bytes(structure, sizes)
    rows = len(sources.calibration_examples)
    read = {path for group in structure.groups for path in group.reads}
    systems = max((repair.system_bytes(sizes[path], rows) for path in read), default=0)
    kept = min(float(disk_offload.IN_MEMORY), _block_bytes(sizes, structure) * rows)
    found = {
        "scoring": graph(sources.scoring),
        "curves": max(graph(sources.calibration), graph(sources.curves) + probed + min(changes, disk_offload.IN_MEMORY))
        + systems,
        "surgery": weights + systems + kept,
    }
    return {stage: round(speed.held_bytes + value) for stage, value in found.items()}


def _block_bytes(sizes: Mapping[str, LayerSize], structure: Structure) -> float:
    """Bytes of one row's values that the repair of one block compares with, and of both models' streams."""
    every = sum(4 * size.positions * size.outputs for size in sizes.values()) / max(len(structure.blocks), 1)
    return 1.5 * every
