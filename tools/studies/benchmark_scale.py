#!/usr/bin/env python3
"""Sharded scoring on one and on two workers of this machine, what travels, and what more workers would make of it.

    python tools/studies/benchmark_scale.py                  # docs/measurements/scale.json; minutes on two cores

A small random ViT is scored (`score: optin`), by one process, by one worker and by two, in turn, several times; workers
are started and have the model before the clock runs, and each computes on one thread. The serial fraction is what one
worker's run takes beyond the sum of its shards' own times. Scaling to more workers is SIMULATED: the measured times of
the shards are given out again, in their order and with the same waits between stages, to so many workers, on top of the
measured serial time. It assumes that workers do not slow each other down; the same simulation for two workers stands
beside what two really took.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import heapq
import json
import os
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch

from optin_export.data import Batch
from optin_export.distributed.ray_session import Options, Session
from optin_export.environment import describe
from optin_export.models import TaskModel
from optin_export.models.tasks import wrap
from optin_export.recipe import Budget, PruneSection
from optin_export.scoring import Map, Partial, Shard, Spread, score
from optin_export.scoring.optin import Scorer
from optin_export.scoring.shards import Work
from optin_export.units import find_structure

RESULT = Path(__file__).resolve().parents[2] / "docs" / "measurements" / "scale.json"
BATCHES, SAMPLES, PROBES, SIZE = 4, 8, 16, 64
MODELS = ("vit_tiny_patch16_224", "vit_small_patch16_224", "vit_base_patch16_224")
SIMULATED = (1, 2, 4, 8, 16, 32)
Wave = list[float]


def make(name: str) -> tuple[TaskModel, list[Batch]]:
    torch.manual_seed(0)
    model = wrap(timm.create_model(name, pretrained=False, img_size=SIZE).eval(), "image-classification", None, False)
    images = torch.randn(BATCHES, SAMPLES, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(0))
    return model, [Batch({"pixel_values": one}, np.arange(SAMPLES)) for one in images]


def settings() -> PruneSection:
    return PruneSection(budget=Budget(macs=0.5), probes=PROBES)


def timed(spread: Spread | None) -> tuple[float, dict[str, np.ndarray]]:
    """Seconds of one scoring without the start of workers, and the scores."""
    model, batches = make(MODELS[0])
    structure, clock = find_structure(model), {"start": time.perf_counter()}

    @contextlib.contextmanager
    def started(work: Work) -> Iterator[Map]:
        assert spread is not None
        with spread(work) as run:
            clock["start"] = time.perf_counter()
            yield run
            clock["end"] = time.perf_counter()

    if spread is None:
        found = score(model, structure, batches, settings(), 0)
        return time.perf_counter() - clock["start"], found.values
    found = score(model, structure, batches, settings(), 0, spread=started)
    return clock["end"] - clock["start"], found.values


def on_workers(session: Session, waves: list[Wave], moved: dict[str, list[int]]) -> Spread:
    """Shards on workers that are up before the clock runs; notes the shards' times, and the bytes that came back."""

    @contextlib.contextmanager
    def spread(work: Work) -> Iterator[Map]:
        with session.pool(work) as pool:
            session.ray.get(list(pool.greeted))
            moved.setdefault("model", []).append(pool.bytes_out)

            def run(shards: Sequence[Shard]) -> Iterable[Partial]:
                wave: Wave = []
                waves.append(wave)
                for shard, (found, facts) in zip(shards, pool.map(shards), strict=True):
                    wave.append(facts["seconds"])
                    moved.setdefault(shard.kind, []).append(facts["bytes"])
                    yield found

            yield run

    return spread


def simulate(waves: Sequence[Wave], workers: int, serial: float) -> float:
    """Seconds, with every shard given to the worker that is free first, and a wait for all after each wave."""
    total = serial
    for wave in waves:
        free = [0.0] * workers
        for seconds in wave:
            heapq.heappush(free, heapq.heappop(free) + seconds)
        total += max(free)
    return total


def interval(values: Sequence[float]) -> dict[str, float]:
    """Median and the 95 % bootstrap interval of the median."""
    generator, array = np.random.default_rng(0), np.asarray(values)
    draws = np.median(array[generator.integers(0, len(array), (2000, len(array)))], axis=1)
    low, high = np.percentile(draws, [2.5, 97.5])
    return {"median": round(float(np.median(array)), 4), "low": round(float(low), 4), "high": round(float(high), 4)}


def traffic() -> list[dict[str, Any]]:
    """Bytes of one worker's copy of the model and data, and of what one shard of each kind gives, by model size."""
    from ray import cloudpickle

    rows = []
    for name in MODELS:
        model, batches = make(name)
        structure = find_structure(model)
        scorer = Scorer(model, structure, batches[:1], settings(), 0)
        heads = next(group for group in structure.groups if group.kind == "heads")
        shards = {
            "probes": Shard("probes", 0, count=1, weight=1.0),
            "exact": Shard("exact", 0, heads.key, (0, 1)),
            "sizes": Shard("sizes", 0),
        }
        back = {kind: sum(array.nbytes for array in scorer(shard).values()) for kind, shard in shards.items()}
        rows.append(
            {
                "model": name,
                "parameters": sum(parameter.numel() for parameter in model.parameters()),
                "units": sum(group.count for group in structure.groups),
                "bytes_to_worker": len(cloudpickle.dumps(scorer)),
                "bytes_of_batches": sum(t.nbytes for one in batches[:1] for t in one.inputs.values()),
                "bytes_back_per_shard": back,
                "bytes_of_a_shards_description": len(cloudpickle.dumps(shards["probes"])),
            }
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--out", type=Path, default=RESULT)
    options = parser.parse_args()
    torch.set_num_threads(1)
    load, rounds, scores = [os.getloadavg()[0]], [], []
    one_waves: list[list[Wave]] = []
    moved: dict[str, list[int]] = {}
    timed(None)  # warm-up
    with Session(Options("local", workers=2)) as session:
        for number in range(options.rounds):
            seconds: dict[str, float] = {}
            for who in np.random.default_rng(number).permutation(["process", "1", "2"]):
                waves: list[Wave] = []
                if who != "process":
                    session.options = dataclasses.replace(session.options, workers=int(who))
                took, values = timed(None if who == "process" else on_workers(session, waves, moved))
                seconds[str(who)] = took
                scores.append(values)
                if who == "1":
                    one_waves.append(waves)
            rounds.append(seconds)
            load.append(os.getloadavg()[0])
            print(seconds, flush=True)
    same = all(np.array_equal(values, scores[0][key]) for one in scores for key, values in one.items())
    serial = [one["1"] - sum(map(sum, waves)) for one, waves in zip(rounds, one_waves, strict=True)]
    # The round whose one-worker time is the median stands for the shards' times.
    middle = int(np.argsort([one["1"] for one in rounds])[len(rounds) // 2])
    waves, rest = one_waves[middle], max(serial[middle], 0.0)
    base = simulate(waves, 1, rest)
    result = {
        "machine": {**describe(), "cores": os.cpu_count()},
        "load_average_1min": [round(value, 2) for value in load],
        "model": {"name": MODELS[0], "image": SIZE, "batches": BATCHES, "samples": SAMPLES, "probes": PROBES},
        "scores_identical": same,
        "rounds": [{name: round(value, 3) for name, value in one.items()} for one in rounds],
        "speedup_2_over_1_worker": interval([one["1"] / one["2"] for one in rounds]),
        "speedup_2_workers_over_process": interval([one["process"] / one["2"] for one in rounds]),
        "overhead_1_worker_over_process": interval([one["1"] / one["process"] for one in rounds]),
        "serial_fraction": interval([left / one["1"] for left, one in zip(serial, rounds, strict=True)]),
        "shards": sum(map(len, waves)),
        "waves": [len(wave) for wave in waves],
        "shard_seconds": {
            "median": round(float(np.median([took for wave in waves for took in wave])), 4),
            "largest": round(max(map(max, waves)), 4),
        },
        "simulated": [
            {"workers": count, "seconds": round(simulate(waves, count, rest), 3)}
            | {"speedup": round(base / simulate(waves, count, rest), 2)}
            for count in SIMULATED
        ],
        "bytes": {kind: {"each": int(np.median(sizes)), "count": len(sizes)} for kind, sizes in moved.items()},
        "traffic": traffic(),
    }
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(f"identical: {same}; {result['speedup_2_over_1_worker']}; written to {options.out}")


if __name__ == "__main__":
    main()
