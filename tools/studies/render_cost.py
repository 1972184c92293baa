"""The section of docs/results.md about what a recipe costs, from docs/measurements/studies/cost.json."""

from __future__ import annotations

import math
from typing import Any

from plots import markdown_table, section

STAGES = ("scoring", "curves", "search", "surgery")
#: Models that are computed: parameters of dense layers in millions, tokens of a row.
LARGER = {
    "BERT-large, 1,024 rows of 16 tokens": (303, 16),
    "BERT-large, 1,024 rows of 128 tokens": (303, 128),
    "ViT-H/14, 1,024 images of 224 pixels": (630, 257),
    "7B decoder, 1,024 rows of 128 tokens": (6480, 128),
}
#: Multiply-adds a second of one forward and backward pass, relative to one core of the measured machine; a GPU's are
#: absolute: half of the 100 TFLOP/s that large products reach in TF32 on one of 2022.
CORES, GPU = {"2 cores": 1.9, "16 cores": 13.0}, 25e12
ROWS = 1024
#: The README's models.
README = {
    "bert-12x256": "BERT, 12 layers of 256",
    "bert-12x768": "BERT-base",
    "mpnet-12x768": "MPNet-base",
    "vit-small": "ViT-S",
    "vit-base": "ViT-B",
    "llama-0.1b": "Llama, 12 layers of 768",
}


def total(row: dict[str, Any]) -> float:
    """CPU seconds from scoring to the repaired model."""
    return sum(float(row["cpu_seconds"][stage]) for stage in STAGES)


def exponent(content: dict[str, Any], names: list[tuple[str, int]], of: Any = total) -> float | None:
    """The slope of the logarithm of `of` over that of the size; None with fewer than two models."""
    points = [(math.log(size), math.log(of(content[name]))) for name, size in names if name in content]
    if len(points) < 2:
        return None
    mean = [sum(axis) / len(points) for axis in zip(*points, strict=True)]
    above = sum((x - mean[0]) * (y - mean[1]) for x, y in points)
    return above / sum((x - mean[0]) ** 2 for x, _ in points)


def cost(content: dict[str, Any]) -> list[str]:
    """Lines of the section."""
    machine = next(iter(content.values()))["machine"]
    rows = [_row(name, row) for name, row in content.items()]
    depth = [(f"bert-{layers}x256", layers) for layers in (4, 8, 12, 24)]
    width = [(f"bert-12x{hidden}", hidden) for hidden in (256, 512, 768)]
    slopes = {
        "layers, 4 to 24, at width 256": (exponent(content, depth), exponent(content, depth, _passes)),
        "width, 256 to 768, at 12 layers": (exponent(content, width), exponent(content, width, _passes)),
    }
    fitted = [[name, _two(of), _two(passes)] for name, (of, passes) in slopes.items() if of is not None]
    prose = [
        "Time and memory from scoring to the repaired model at half of the MACs, by size of the model",
        "(`tools/studies/study_cost.py`). Weights are random: the time does not depend on their values. Text models",
        "have 1,024 calibration rows of 7 to 40 tokens, image models 256 images. *Passes*: the time of one forward and",
        "one backward pass, with the gradients of all weights, of the calibration rows, in the same process. Seconds",
        "are CPU time of one thread; the forecast (`--dry-run`) is in seconds of the clock, and so is what it is",
        "compared with. Clock times far above the CPU times are those of a machine that had other work.",
        f"{machine['cpu']}; torch {machine['packages']['torch']}.",
    ]
    columns = ["model", "million parameters", "scoring", "loss curves", "repair", "all, s", "passes"]
    columns += ["clock, s", "forecast, s", "peak, GiB", "forecast, GiB"]
    lines = section("What a recipe costs", prose, columns, rows)
    lines += ["", "Fitted exponents: time is proportional to the size to this power.", ""]
    lines += markdown_table(["size", "recipe", "one forward and backward pass"], fitted)
    if "bert-12x768" in content:
        lines += ["", *_larger(content["bert-12x768"])]
    return lines


def _row(name: str, row: dict[str, Any]) -> list[str]:
    seconds, clock = row["cpu_seconds"], row["stage_wall_seconds"]
    expected = row["expected_seconds"]
    forecast = sum(value for value in expected.values() if value is not None)
    taken = sum(clock[stage] for stage, value in expected.items() if value is not None)
    peak = max(value or 0 for value in row["peak_bytes"].values()) / 2**30
    return [
        f"`{name}`",
        f"{row['parameters'] / 1e6:.0f}",
        *(f"{seconds[stage]:.0f}" for stage in ("scoring", "curves", "surgery")),
        f"{total(row):.0f}",
        f"{row['ratio']:.1f}",
        f"{taken:.0f}",
        f"{forecast:.0f}",
        f"{peak:.1f}",
        f"{max(row['expected_peak_bytes'].values()) / 2**30:.1f}",
    ]


def expected(content: dict[str, Any]) -> list[str]:
    """The README's table: what the command forecasts for models of several sizes, and what they took."""
    shown = [(title, content[name]) for name, title in README.items() if name in content]
    rows = []
    for title, row in shown:
        forecast = {stage: value for stage, value in row["expected_seconds"].items() if value is not None}
        taken = sum(row["stage_wall_seconds"][stage] for stage in forecast)
        peaks = max(row["expected_peak_bytes"].values()), max(value or 0 for value in row["peak_bytes"].values())
        rows.append(
            [
                f"{title} ({row['parameters'] / 1e6:.0f} M)",
                f"{row['rows']:,}",
                f"{sum(forecast.values()) / 60:.1f}",
                f"{taken / 60:.1f}",
                *(f"{peak / 2**30:.1f}" for peak in peaks),
            ]
        )
    head = ["model (parameters)", "calibration rows", "minutes forecast", "taken", "GiB forecast", "needed"]
    return markdown_table(head, rows)


def _passes(row: dict[str, Any]) -> float:
    return float(row["forward_backward_cpu_seconds"])


def _two(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def _larger(base: dict[str, Any]) -> list[str]:
    """What the measured ratio to passes means for models that were not run."""
    dense, tokens = 85e6, 16  # of BERT-base, and of its rows here
    speed = 3 * dense * tokens * ROWS / _passes(base)
    rows = []
    for name, (millions, length) in LARGER.items():
        work = float(base["ratio"]) * 3 * millions * 1e6 * length * ROWS
        rows.append([name, *(_time(work / speed / cores) for cores in CORES.values()), _time(work / GPU)])
    return [
        f"**Computed, not measured**: {base['ratio']:.1f} passes, as for BERT-base, of larger models. Cores are those",
        "of this machine, 1.9 and 13 times as fast as one; the GPU is taken to do 25 million million multiply-adds a",
        "second.",
        "Memory may not suffice: the weights of a 7B decoder in float32 take 26 GiB, twice that in the repair.",
        "",
        *markdown_table(["model", *CORES, "one data-centre GPU"], rows),
    ]


def _time(seconds: float) -> str:
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
