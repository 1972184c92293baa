"""Peak memory of scoring and of the repair, by the number of calibration rows: it must not grow with them.

    python tools/studies/study_memory.py            writes docs/measurements/memory.json and docs/figures/memory.svg
    python tools/studies/study_memory.py --figure   only the figure, from the committed measurements

Every point is a process of its own (forked), whose peak is what the kernel says of it (VmHWM) less what it held when
model and rows were loaded: the rows themselves are the user's data, and are shown apart.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
RESULT, FIGURE = ROOT / "docs" / "measurements" / "memory.json", ROOT / "docs" / "figures" / "memory.svg"
ROWS = (128, 256, 512, 1024, 2048)
STAGES = ("scoring", "compensation")
#: Block outputs beyond this lie in files (1 GiB by default: more than a study of minutes can fill).
SPILL = 2 << 20
#: glibc keeps freed blocks for later by default, more the longer a process runs: what is held shows only without that.
ALLOCATOR = {"MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_THRESHOLD_": "65536"}


def peak() -> int:
    """Bytes: the most this process has held since the last reset."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024


def reset() -> int:
    """Forget the peak so far; what is held now."""
    Path("/proc/self/clear_refs").write_text("5")
    return peak()


def one(stage: str, rows: int) -> dict[str, Any]:
    """Memory of one stage with so many calibration rows, of a small ViT with random weights."""
    import numpy as np
    import torch

    from optin_export import pruning, scoring
    from optin_export.data import load_sources
    from optin_export.recipe import validate
    from optin_export.repair import RepairSettings, compensate
    from optin_export.search import GroupPlan
    from optin_export.units import find_structure
    from optin_export.workdir import disk_offload

    torch.set_num_threads(1)
    disk_offload.IN_MEMORY = SPILL
    with tempfile.TemporaryDirectory() as folder:
        images = np.random.default_rng(0).integers(0, 256, (rows, 32, 32), dtype=np.uint8)
        np.savez(Path(folder) / "images.npz", images=images)
        arguments = {"img_size": 32, "patch_size": 8, "in_chans": 1, "num_classes": 10, "embed_dim": 64, "depth": 2}
        recipe = {
            "recipe": 1,
            "name": "memory",
            "model": {
                "source": "timm:vit_tiny_patch16_224",
                "task": "image-classification",
                "weights": "random",
                "args": {**arguments, "num_heads": 4},
                "preprocess": {"size": [32, 32], "mean": [0.5], "std": [0.5]},
            },
            "data": {"calibration": {"source": f"npz:{folder}/images.npz"}},
            "prune": {"budget": {"macs": 0.5}, "probes": 4, "score_samples": rows},
        }
        sources = load_sources(validate(recipe, Path(folder)))
        structure = find_structure(sources.model)
        batches = sources.calibration if stage == "compensation" else sources.scoring
        held = sum(tensor.numel() * tensor.element_size() for batch in batches for tensor in batch.inputs.values())
        plan = {
            group.key: GroupPlan(count=group.count, kept=tuple(range(group.count // 2))) for group in structure.groups
        }
        before = reset()
        if stage == "scoring":
            scoring.score(sources.model, structure, batches, sources.recipe.prune, 0)
        else:
            dense, smaller = pruning.rebuild(sources.model, structure, plan, sources.fixed(2))
            compensate(sources.model, dense, structure, smaller, plan, batches, RepairSettings())
        return {"stage": stage, "rows": rows, "row_bytes": held, "bytes": peak() - before}


def apart(stage: str, rows: int) -> dict[str, Any]:
    """One point in a forked process: it shares what has been imported, and has a peak of its own."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        code = 1
        try:
            os.write(writing, json.dumps(one(stage, rows)).encode())
            code = 0
        finally:
            os._exit(code)
    os.close(writing)
    with os.fdopen(reading, "rb") as pipe:
        told = pipe.read()
    if os.waitpid(child, 0)[1]:
        raise SystemExit(f"{stage} with {rows} rows failed")
    point: dict[str, Any] = json.loads(told)
    return point


def measure() -> dict[str, Any]:
    import timm.data  # noqa: F401 - before the forks
    import torch_pruning  # noqa: F401

    import optin_export.stages.pipeline  # noqa: F401
    from optin_export.environment import describe

    points = []
    for stage in STAGES:
        for rows in ROWS:
            points.append(apart(stage, rows))
            print(points[-1], file=sys.stderr, flush=True)
    return {
        "machine": describe(),
        "spill_bytes": SPILL,
        "allocator": ALLOCATOR,
        "model": "ViT, 2 blocks of 64, 17 tokens, random weights",
        "points": points,
    }


def render(result: dict[str, Any]) -> None:
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "optin-export"
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(6, 3.5), layout="constrained")
    for stage in STAGES:
        points = [point for point in result["points"] if point["stage"] == stage]
        rows = [point["rows"] for point in points]
        axes.plot(rows, [point["bytes"] / 2**20 for point in points], marker="o", label=stage)
    axes.plot(rows, [point["row_bytes"] / 2**20 for point in points], linestyle=":", color="gray", label="the rows")
    axes.set(xscale="log", xlabel="calibration rows", ylabel="MiB above the loaded model", ylim=(0, None))
    axes.set_xticks(rows, [str(count) for count in rows], minor=False)
    axes.legend()
    figure.savefig(FIGURE, metadata={"Date": None})


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--figure", action="store_true", help="only the figure")
    parser.add_argument("--one", nargs=2, metavar=("STAGE", "ROWS"), help="one point, as JSON")
    options = parser.parse_args()
    if not options.figure and any(os.environ.get(name) != value for name, value in ALLOCATOR.items()):
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, **ALLOCATOR})
    if options.one:
        print(json.dumps(one(options.one[0], int(options.one[1]))))
    else:
        if not options.figure:
            RESULT.write_text(json.dumps(measure(), indent=2) + "\n", encoding="utf-8")
        render(json.loads(RESULT.read_text(encoding="utf-8")))
