#!/usr/bin/env python3
"""How close loss curves to second order, corrected by measured points, come to curves that are measured throughout.

    python tools/studies/study_curves.py --cases resnet20-cifar10 resnet56-cifar10 vit-cifar10

Every curve of a case is measured at all counts, on all rows; the same rows give it to second order. Each way makes a
plan per budget, whose loss is then read from the measured curves: the way that measures everything has the least by
definition, and the others can be compared with it. Nothing is repaired or evaluated.
Writes docs/measurements/studies/curves.json, one row per case and way, with the forward passes of a row that the
measured points take.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import numpy as np
from benchmark_accuracy import CASES, Bench, recipe_of
from study_files import machine, save, saved_rows

from optin_export import repair
from optin_export.data import load_sources
from optin_export.repair import curves as loss_curves
from optin_export.repair.measured_points import corrected
from optin_export.units import later_share

NAME = "curves"


@dataclass(frozen=True)
class Way:
    """How curves are corrected by measured losses.

    shares: every group is measured at its smallest count and at these shares of its units; None: nothing is measured.
    thinned: 4 measures every fourth batch of rows, 1 all of them.
    """

    shares: tuple[float, ...] | None
    thinned: int = 1


WAYS = {
    "measured at all counts": None,
    "second order alone": Way(None),
    "2 points, a quarter of the rows": Way((0.25,), 4),
    "2 points, all rows": Way((0.25,)),
    "4 points, a quarter of the rows": Way((0.25, 0.5, 0.75), 4),
    "4 points, all rows": Way((0.25, 0.5, 0.75)),
}


class Recorder:
    """Both kinds of losses of every group, batch by batch: float64 [batches, counts, 2], in sums over samples."""

    def __init__(self, bench: Bench, scores: Any) -> None:
        self.bench, self.second, self.measured = bench, [], []  # type: ignore[var-annotated]
        self.samples = [len(batch.rows) for batch in bench.sources.curves]
        with (
            patch.object(loss_curves, "second_order_losses", self._second(loss_curves.second_order_losses)),
            patch.object(loss_curves, "losses_of", self._losses(loss_curves.losses_of)),
            patch.object(loss_curves, "measured_at", lambda structure, counts: list(range(len(counts) - 1))),
            patch.object(loss_curves, "thinned", lambda *_: 1),
            patch.object(loss_curves, "corrected", lambda counts, losses, at, measured, predicted: measured),
        ):
            self.curves = bench.measured_curves(scores)

    def _second(self, real: Any) -> Any:
        def recorded(*arguments: Any) -> list[np.ndarray]:
            self.second = real(*arguments)
            return self.second

        return recorded

    def _losses(self, real: Any) -> Any:
        def recorded(
            model: Any, structure: Any, group: Any, references: Sequence[Any], temperature: float, *rest: Any
        ) -> np.ndarray:
            each = [real(model, structure, group, [one], temperature, *rest) for one in references]
            self.measured.append((group.key, np.array(each)))
            return np.sum(each, 0)

        return recorded

    def by(self, way: Way | None) -> dict[str, np.ndarray]:
        """The curves, both terms apart."""
        found = {}
        for second, (key, measured) in zip(self.second, self.measured, strict=True):
            curve = self.curves[key].copy()
            if way is not None:
                curve[:-1, 1:] = self._by(way, curve[:, 0].astype(int).tolist(), second, measured)
            found[key] = curve
        return found

    def _by(self, way: Way, counts: Sequence[int], second: np.ndarray, measured: np.ndarray) -> np.ndarray:
        means: np.ndarray = second.sum(0) / sum(self.samples)
        if way.shares is None:
            return means
        few, at = slice(None, None, way.thinned), points(counts, way.shares)
        samples = sum(self.samples[few])
        both = [some[few][:, at].sum(0) / samples for some in (measured, second)]
        return corrected(counts, means, at, *both)

    def passes(self, way: Way | None) -> float:
        """Forward passes of one row, through all blocks, for the measured points of all groups."""
        if way is not None and way.shares is None:
            return 0.0
        groups, rows = {group.key: group for group in self.bench.structure.groups}, sum(self.samples)
        total = 0.0
        for key, curve in self.curves.items():
            counts = curve[:, 0].astype(int).tolist()
            number = len(counts) - 1 if way is None else len(points(counts, way.shares or ()))
            total += number * later_share(self.bench.structure, groups[key])
        return total * rows / (1 if way is None else way.thinned)


def points(counts: Sequence[int], shares: Sequence[float]) -> list[int]:
    """Which of the counts are measured: the smallest, and those next to these shares of the units."""
    known = np.array(counts[:-1])
    return sorted({0, *(int(np.argmin(np.abs(known - share * counts[-1]))) for share in shares)})


def loss_of(kept: Mapping[str, int], curves: Mapping[str, np.ndarray]) -> float:
    """The sum of the losses of a plan, by curves of one loss per point."""
    return sum(float(np.interp(count, *curves[key].T)) for key, count in kept.items())


def main() -> None:
    parser = argparse.ArgumentParser(description="Loss curves to second order against measured ones.")
    parser.add_argument("--cases", nargs="+", choices=CASES, default=("resnet20-cifar10", "resnet56-cifar10"))
    parser.add_argument("--budgets", nargs="+", type=float, default=(0.8, 0.6, 0.5, 0.4, 0.3))
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    rows = saved_rows(NAME)
    for case in args.cases:
        bench = Bench(load_sources(recipe_of(case, args.seed)))
        scores, _ = bench.score("magnitude" if bench.structure.convolutional else "optin")
        recorder = Recorder(bench, scores)
        kind = bench.model.output_kind
        real = repair.combined(recorder.curves, kind)
        rows = [row for row in rows if (row["case"], row["seed"]) != (case, args.seed)]
        for name, way in WAYS.items():
            own = repair.combined(recorder.by(way), kind)
            losses = {}
            for budget in args.budgets:
                plan = bench.plan(scores, budget, own)
                losses[f"{budget:g}"] = loss_of({key: len(one.kept) for key, one in plan.groups.items()}, real)
            facts = {"case": case, "seed": args.seed, "way": name, "groups": len(recorder.curves)}
            rows.append({**facts, "passes": round(recorder.passes(way)), "rows": sum(recorder.samples), "loss": losses})
            print(rows[-1], flush=True)
        save(NAME, {**machine("torch"), "rows": rows})


if __name__ == "__main__":
    main()
