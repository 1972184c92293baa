"""The cost of work on several workers, by stage: cluster/costs.json in the run folder, shown in the report."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from optin_export.report import COSTS, costs_of
from optin_export.workdir.files import append_text, write_json


@dataclass
class Spent:
    """One stage. worker_seconds: summed over workers, inside their work; gpu_seconds: times the GPUs each held."""

    worker_seconds: float = 0.0
    gpu_seconds: float = 0.0
    tasks: int = 0
    retried: int = 0
    reused: int = 0
    workers: set[str] = field(default_factory=set)
    bytes_out: int = 0
    bytes_back: int = 0


class Book:
    """Costs and logs of one run: one log per worker, which this process writes from the workers' messages."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.stages: dict[str, Spent] = {}

    def stage(self, name: str) -> Spent:
        return self.stages.setdefault(name, Spent())

    def done(self, stage: str, what: str, facts: Mapping[str, Any]) -> None:
        """Enter one finished task. facts: worker, seconds, gpus, and the lines it printed, from the worker."""
        spent = self.stage(stage)
        spent.worker_seconds += facts["seconds"]
        spent.gpu_seconds += facts["seconds"] * facts["gpus"]
        spent.tasks += 1
        spent.workers.add(facts["worker"])
        self.log(facts["worker"], f"{stage}: {what}: {facts['seconds']:.3f} s", *facts["printed"])

    def log(self, worker: str, *lines: str) -> None:
        now = time.strftime("%Y-%m-%dT%H:%M:%S")
        append_text(self.folder / "cluster" / f"{worker}.log", "".join(f"{now} {line}\n" for line in lines))

    def save(self) -> None:
        """Write the costs of the stages that did work, without changing those of other stages."""
        known = costs_of(self.folder)
        for name, spent in self.stages.items():
            if spent.tasks or spent.reused:
                entry = {**vars(spent), "workers": len(spent.workers)}
                entry |= {key: round(entry[key], 3) for key in ("worker_seconds", "gpu_seconds")}
                known[name] = entry
        if known:
            write_json(self.folder / COSTS, known)
