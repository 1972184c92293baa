#!/usr/bin/env python3
"""The measured part of docs/scale.md out of docs/measurements/scale.json, which benchmark_scale.py writes.

python tools/studies/render_scale.py
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from plots import section

from optin_export.measure import latency

DOCS = Path(__file__).resolve().parents[2] / "docs"
#: Of the plan: models, and the default number of shipped batch sizes.
MODELS, BATCH_SIZES = 1000, 2
#: Load average on two cores above which somebody else was at work, too.
BUSY = 2.2


def ratio(value: dict[str, float]) -> str:
    return f"{value['median']:.2f} (95 % interval {value['low']:.2f} to {value['high']:.2f})"


def render(found: dict[str, Any], page: str) -> str:
    """The page with its measured part replaced."""
    lines = [*measured(found), *simulated(found), *traffic(found), *clocks(found)]
    text = "\n".join(["<!-- measured -->", *lines, "<!-- end -->"])
    return re.sub(r"<!-- measured -->.*?<!-- end -->", lambda _: text, page, flags=re.DOTALL)


def measured(found: dict[str, Any]) -> list[str]:
    machine, model, load = found["machine"], found["model"], found["load_average_1min"]
    busy = "**The machine was not idle**: these" if max(load[1:]) > BUSY else "These"
    rows = [
        ["two workers against one", f"{ratio(found['speedup_2_over_1_worker'])} times faster"],
        ["two workers against one process", f"{ratio(found['speedup_2_workers_over_process'])} times faster"],
        ["one worker against one process", f"{ratio(found['overhead_1_worker_over_process'])} of its time"],
        ["serial fraction, one worker", ratio(found["serial_fraction"])],
        ["scores of all runs", "identical to the last bit" if found["scores_identical"] else "**differ**"],
    ]
    prose = [
        f"`tools/studies/benchmark_scale.py` ([raw](measurements/scale.json)) on {machine['cpu']},",
        f"{machine['cores']} cores.",
        f"{busy} are ratios of runs in turn (load average {min(load):.1f} to {max(load):.1f}, our own runs included).",
        f"`{model['name']}` with random weights, {model['image']} pixels, {model['batches']} batches of",
        f"{model['samples']}, {model['probes']} probes, {found['shards']} shards; one thread per worker; workers run",
        "and have the model before the clock starts. The serial fraction is the time of a run with one worker beyond",
        "the sum of its shards' times: sending, receiving, adding up.",
    ]
    columns = ["", f"median of {len(found['rounds'])} rounds"]
    return [*section("Measured: one and two workers", prose, columns, rows), ""]


def simulated(found: dict[str, Any]) -> list[str]:
    waves = ", ".join(map(str, found["waves"]))
    prose = [
        "The measured shard times, scheduled on more workers with the same waits between the stages of the",
        f"scoring (of {waves} shards), plus the measured serial time. It assumes that workers do not slow each",
        "other down. Scaling ends if a stage has fewer shards than there are workers: more calibration batches",
        "(`prune.score_samples`) give more shards.",
    ]
    rows = [[str(one["workers"]), f"{one['speedup']:.2f}"] for one in found["simulated"]]
    columns = ["workers (simulated)", "times faster than one"]
    return [*section("Simulated, not measured: more workers", prose, columns, rows), ""]


def traffic(found: dict[str, Any]) -> list[str]:
    rows = [
        [
            one["model"],
            f"{one['parameters'] / 1e6:.1f} M",
            f"{one['bytes_to_worker'] / 1e6:.1f} MB",
            f"{one['bytes_of_batches'] / 1e6:.2f} MB",
            f"{one['bytes_of_a_shards_description']} B",
            f"{one['bytes_back_per_shard']['probes'] / 1e3:.1f} kB",
            f"{one['bytes_back_per_shard']['exact']} B",
        ]
        for one in found["traffic"]
    ]
    columns = ["model", "parameters", "to a worker, once", "of it batches", "out, a shard"]
    prose = [
        "Measured sizes of the objects themselves. The model and the batches go to a worker once; a shard's",
        "description goes out, its float64 sums come back. Hidden states and noise are never sent: a worker observes",
        "its own batches, and draws noise from the seed and the probe's number. So: 4 bytes per parameter out, once;",
        "8 bytes per sketched unit back for a shard with one probe, twice that for any more (two halves).",
    ]
    return [*section("Traffic", prose, [*columns, "back, one probe", "back, two heads masked"], rows), ""]


def clocks(found: dict[str, Any]) -> list[str]:
    """How long a machine is taken by measurements, from the package's own constants."""
    arms = 3  # base, base again, pruned
    low, high = (
        BATCH_SIZES * arms * (blocks * latency.BLOCK_SECONDS + warm + (blocks // latency.PER_ROUND - 1) * again)
        for blocks, warm, again in (
            (latency.BLOCKS, latency.WARM_UP_SECONDS, latency.WARM_UP_AGAIN),
            (latency.MAX_BLOCKS, latency.WARM_UP_LIMIT, latency.WARM_UP_LIMIT),
        )
    )
    moved = found["traffic"][-1]["bytes_to_worker"]
    rows = [
        ["one model, one target", f"{low:.0f} to {high:.0f} s"],
        [
            f"{MODELS:,} models, one machine per target",
            f"{MODELS * low / 3600:.1f} to {MODELS * high / 3600:.1f} hours",
        ],
        [f"{MODELS:,} models of the largest size above to workers", f"{MODELS * moved / 1e9:.0f} GB"],
    ]
    prose = [
        f"Computed, not measured, for {BATCH_SIZES} batch sizes in fp32 on a CPU: {latency.BLOCKS} to",
        f"{latency.MAX_BLOCKS} blocks of {arms} arms of {latency.BLOCK_SECONDS:g} s each, and the warm-up; parity,",
        "accuracy and building come on top.",
    ]
    return section("Measurement time", prose, ["", ""], rows)


def main() -> None:
    found = json.loads((DOCS / "measurements" / "scale.json").read_text(encoding="utf-8"))
    path = DOCS / "scale.md"
    path.write_text(render(found, path.read_text(encoding="utf-8")), encoding="utf-8")
    print(path)


if __name__ == "__main__":
    main()
