"""docs/measurements/accuracy/<case>.json as tables of means over seeds; written by benchmark_accuracy.py."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from held_out import REPORT

from optin_export.scoring import CHANNELS

CASES = {
    "minilm-stsb": "MiniLM-L6 on STS-B",
    "minilm-sst2": "MiniLM-L6 on SST-2",
    "resnet56-cifar10": "ResNet-56 on CIFAR-10",
    "resnet56-cifar10-5k": "ResNet-56 on CIFAR-10, 5,000 calibration images",
    "resnet56-cifar10-curves": "ResNet-56 on CIFAR-10, 5,000 calibration images, 1,024 of them for the loss curves",
    "resnet20-cifar10": "ResNet-20 on CIFAR-10",
    "vit-digits": "ViT on handwritten digits",
    "vit-cifar10": "ViT on CIFAR-10",
    "deit-tiny": "DeiT-Tiny on ImageNet photos, heads and neurons",
    "segformer-camvid": "SegFormer on CamVid",
    "mask2former-camvid": "Mask2Former on CamVid",
}
OWN, REPAIRED, REFINED = "optin", "least-squares", "gauss-newton"
BUDGETS = (0.7, 0.6, 0.5, 0.4, 0.3)
REPAIRS = {
    "gauss-newton": "least-squares repair and Gauss-Newton on the output",
    "least-squares": "least-squares repair",
    "distill": "least-squares repair and distillation on the unlabelled rows",
    "rescale": "rescaling",
    "none": "no repair",
}
#: Colour (Okabe-Ito's) and marker of each scorer, in the order of tables and legends.
SCORERS = {
    "optin": ("#0072b2", "o"),
    "optin-exact": ("#56b4e9", "P"),
    "optin-reference": ("#000000", "D"),
    "fisher": ("#e69f00", "^"),
    "activation": ("#009e73", "s"),
    "magnitude": ("#d55e00", "v"),
    "random": ("#cc79a7", "X"),
    "obs": ("#8c564b", "*"),
}
EPSILON = 1e-9  # sums of decimals are not exact


@dataclass(frozen=True)
class Cell:
    """What was measured at one budget: one value per seed. bounds: the intervals of the drops, where there are any."""

    drops: tuple[float, ...]
    accuracies: tuple[float, ...]
    macs: float
    bounds: tuple[tuple[float, float], ...] = ()

    @property
    def drop(self) -> float:
        return statistics.fmean(self.drops)

    @property
    def accuracy(self) -> float:
        return statistics.fmean(self.accuracies)

    @property
    def spread(self) -> float:
        """Standard deviation over seeds; 0 if there is one."""
        return statistics.stdev(self.drops) if len(self.drops) > 1 else 0.0

    @property
    def interval(self) -> str:
        """Of the mean: the means of the seeds' own ends, because all seeds are judged on the same rows."""
        low, high = (statistics.fmean(ends) for ends in zip(*self.bounds, strict=True))
        return f"{low:z.2f} to {high:z.2f}"

    def __str__(self) -> str:
        return f"{self.drop:z.2f}" + (f" ± {self.spread:.2f}" if len(self.drops) > 1 else "")


class Table:
    """Rows of one case that may be compared: of one machine, on the same held-out rows.

    part: of the held-out rows; None: all of them, which is what rows have that are older than the parts.
    lines: {(scorer, repair): {budget: Cell}}, in the order of the page.
    """

    def __init__(self, document: dict[str, Any], rows: list[dict[str, Any]], part: str | None) -> None:
        self.document, self.rows, self.part, self.name = document, rows, part, str(document["case"])
        self.title = CASES.get(self.name, self.name)
        self.seeds = sorted({row["seed"] for row in rows})
        self.base = statistics.fmean({row["seed"]: self._values(row)["base"] for row in rows}.values())
        keys = {(row["scorer"], row["repair"]) for row in rows}
        self.lines: dict[tuple[str, str], dict[float, Cell]] = {}
        for key in sorted(keys, key=lambda key: (*_place(SCORERS, key[0]), *_place(REPAIRS, key[1]))):
            chosen = [row for row in rows if (row["scorer"], row["repair"]) == key]
            self.lines[key] = {
                budget: self._cell([row for row in chosen if row["budget"] == budget])
                for budget in sorted({row["budget"] for row in chosen}, reverse=True)
            }
        self.budgets = sorted({*BUDGETS, *(row["budget"] for row in rows)}, reverse=True)

    def get(self, scorer: str, repair: str, budget: float) -> Cell | None:
        return self.lines.get((scorer, repair), {}).get(budget)

    def on(self, part: str | None) -> Table:
        """The same models on other held-out rows."""
        return Table(self.document, self.rows, part)

    @property
    def scorer(self) -> str:
        """What `prune.score: auto` takes for the case's model; ResNets have channels only."""
        return CHANNELS if self._convolutional and (CHANNELS, REPAIRED) in self.lines else OWN

    @property
    def repair(self) -> str:
        """What `prune.compensate: true` and `gauss_newton: auto` do for the case's model, where that was measured."""
        return REFINED if self._convolutional and (self.scorer, REFINED) in self.lines else REPAIRED

    @property
    def _convolutional(self) -> bool:
        return self.name.startswith("resnet")

    def _values(self, row: dict[str, Any]) -> dict[str, Any]:
        return row if self.part is None else row["parts"][self.part]

    def _cell(self, rows: list[dict[str, Any]]) -> Cell:
        values = [self._values(row) for row in rows]
        drops, accuracies = (tuple(value[name] for value in values) for name in ("drop", "accuracy"))
        bounds = tuple((value["drop_low"], value["drop_high"]) for value in values if "drop_low" in value)
        return Cell(drops, accuracies, statistics.fmean(row["macs"] for row in rows), bounds)


@dataclass(frozen=True)
class Case:
    """A file's tables: first those of the report half, the newest machine first, then those of all held-out rows."""

    name: str
    document: dict[str, Any]
    tables: tuple[Table, ...]

    @property
    def main(self) -> Table:
        return self.tables[0]

    @property
    def older(self) -> Table | None:
        """What was measured before there were parts, if the main table is not that already."""
        return next((table for table in self.tables[1:] if table.part is None), None)


def case_of(document: dict[str, Any]) -> Case:
    """Rows without parts, and rows of different machines or versions of torch, are different tables."""
    shared = {key: document[key] for key in ("machine", "torch", "written") if key in document}
    kinds: dict[tuple[bool, str], list[dict[str, Any]]] = {}
    for row in (shared | row for row in document["rows"]):
        kinds.setdefault(("parts" in row, json.dumps([row["machine"], row["torch"]], sort_keys=True)), []).append(row)
    newest = sorted(kinds.items(), key=lambda kind: (kind[0][0], max(row["written"] for row in kind[1])), reverse=True)
    tables = (Table(document, rows, REPORT if has_parts else None) for (has_parts, _), rows in newest)
    return Case(str(document["case"]), document, tuple(tables))


def cases(measurements: Path) -> list[Case]:
    """The cases that were measured, in the order of the page."""
    paths = sorted((measurements / "accuracy").glob("*.json"), key=lambda path: _place(CASES, path.stem))
    found = [case_of(json.loads(path.read_text(encoding="utf-8"))) for path in paths]
    return [case for case in found if case.tables]


def _place(order: Iterable[str], name: str) -> tuple[int, str]:
    known = list(order)
    return (known.index(name) if name in known else len(known)), name
