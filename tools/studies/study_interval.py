"""How often the interval of a speedup holds the truth, in simulation: `python tools/studies/study_interval.py`.

Calls of three arms (the unpruned engine twice, the pruned one) are drawn as `measure_latency` times them, from machines
whose true speedup is known, and the interval is computed by the function that computes it for a run, rounds being added
until it is narrow, as in a run. Machines differ in what disturbs them:

- noise: single calls, and blocks, vary.
- drift: all arms become slower while they are measured.
- clock: all arms share a machine that changes between two speeds.
- instance: each loaded engine has a state of its own, drawn when it is loaded: a third are slow by 8 %.
- spread: the same, but from a normal distribution with a standard deviation of 4 %.
- everything: all of these at once.

`one instance` is the interval of a measurement that loads each engine once, with a bootstrap over blocks. Needs no
model and no engine; one core, about two minutes.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from optin_export.environment import describe
from optin_export.measure import latency
from optin_export.measure.rounds import Speedup, speedup_of
from optin_export.workdir.files import write_json

TRUTH = 1.8
CALLS = 10
RESULT = Path(__file__).resolve().parents[2] / "docs" / "measurements" / "studies" / "interval.json"


@dataclass(frozen=True)
class Machine:
    """Relative sizes of what disturbs a measurement. slow: how much slower a slow instance is; a third of them are."""

    call: float = 0.03
    block: float = 0.01
    drift: float = 0.0
    clock: float = 0.0
    slow: float = 0.0
    spread: float = 0.0


MACHINES = {
    "noise": Machine(),
    "drift": Machine(drift=0.15),
    "clock": Machine(clock=0.2),
    "instance": Machine(slow=0.08),
    "spread": Machine(spread=0.04),
    "everything": Machine(drift=0.1, clock=0.1, slow=0.05, spread=0.02),
}
ARMS = {"base": TRUTH, "again": TRUTH, "pruned": 1.0}


class Simulation:
    """Milliseconds of every arm, block by block. per_round: blocks until engines are loaded again."""

    def __init__(self, machine: Machine, per_round: int, seed: int) -> None:
        self.machine, self.per_round = machine, per_round
        self.generator = np.random.default_rng(seed)
        self.samples: dict[str, list[np.ndarray]] = {name: [] for name in ARMS}
        self.rounds: list[int] = []
        self.fast = True
        self.state: dict[str, float] = {}

    def block(self) -> None:
        machine, draw, number = self.machine, self.generator, len(self.rounds)
        if number % self.per_round == 0:
            self.state = {
                name: (1 + machine.slow * (draw.random() < 1 / 3)) * np.exp(machine.spread * draw.normal())
                for name in ARMS
            }
        self.fast = self.fast if draw.random() < 0.7 else not self.fast
        common = (1 + machine.drift * number / 24) * (1 if self.fast else 1 + machine.clock)
        self.rounds.append(number // self.per_round)
        for name, cost in ARMS.items():
            noise = np.exp(machine.block * draw.normal() + machine.call * np.abs(draw.normal(size=CALLS)))
            self.samples[name].append(cost * common * self.state[name] * noise)


def in_rounds(machine: Machine, seed: int) -> Speedup:
    simulation = Simulation(machine, latency.PER_ROUND, seed)
    planned = latency.BLOCKS
    while True:
        while len(simulation.rounds) < planned:
            simulation.block()
        samples = simulation.samples
        found = speedup_of(
            (samples["base"], samples["again"]), samples["pruned"], simulation.rounds, np.random.default_rng(seed)
        )
        if latency.narrow(found) or planned >= latency.MAX_BLOCKS:
            return found
        planned += latency.MORE_BLOCKS


def one_instance(machine: Machine, seed: int) -> Speedup:
    """Engines loaded once; the two arms of the unpruned model are the same instance."""
    simulation = Simulation(machine, 10**9, seed)
    simulation.block()
    simulation.state["again"] = simulation.state["base"]
    simulation.samples = {name: [] for name in ARMS}
    simulation.rounds = []
    state = dict(simulation.state)
    planned = latency.BLOCKS
    while True:
        while len(simulation.rounds) < planned:
            simulation.block()
            if len(simulation.rounds) == 1:  # the first block drew states
                simulation.state = state
        slow = [
            np.concatenate(pair) for pair in zip(simulation.samples["base"], simulation.samples["again"], strict=True)
        ]
        above, below = np.asarray(slow), np.asarray(simulation.samples["pruned"])
        draws = np.random.default_rng(seed).integers(0, planned, (500, planned))
        ratios = np.median(above[draws].reshape(500, -1), 1) / np.median(below[draws].reshape(500, -1), 1)
        low, high = np.percentile(ratios, [2.5, 97.5])
        found = Speedup(float(np.median(above) / np.median(below)), float(low), float(high))
        if latency.narrow(found) or planned >= latency.MAX_BLOCKS:
            return found
        planned += latency.MORE_BLOCKS


def covered(method: Callable[[Machine, int], Speedup], machine: Machine, runs: int) -> dict[str, float]:
    found = [method(machine, seed) for seed in range(runs)]
    return {
        "runs": runs,
        "covered": sum(one.ci_low <= TRUTH <= one.ci_high for one in found),
        "half_width": round(float(np.median([(one.ci_high - one.ci_low) / 2 / one.median for one in found])), 4),
        "error": round(float(np.median([abs(one.median / TRUTH - 1) for one in found])), 4),
    }


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--runs", type=int, default=200)
    parser.add_argument("--out", type=Path, default=RESULT)
    options = parser.parse_args(arguments)
    rows = []
    for name, machine in MACHINES.items():
        for method in (one_instance, in_rounds):
            rows.append({"machine": name, "method": method.__name__, **covered(method, machine, options.runs)})
            print(json.dumps(rows[-1]), flush=True)
    write_json(options.out, {"truth": TRUTH, "rows": rows, "environment": describe()})
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
