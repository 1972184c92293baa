"""The results that each stage passes to later ones, in addition to the files in the run directory.

`load`, `export` and `ship` pass on only files.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from optin_export.measure import Gate, Measured
from optin_export.repair import FineTune, Repair
from optin_export.report.schema import CandidateResult, EngineResult
from optin_export.search import Plan


@dataclass(frozen=True)
class ScoringResult:
    """path: one float64 tensor of scores per group. info: facts about how they were obtained, for the report."""

    path: Path
    info: dict[str, float]


@dataclass(frozen=True)
class CurvesResult:
    """path: the file of the loss curves; None with `allocation: additive`, which needs no curves."""

    path: Path | None


@dataclass(frozen=True)
class SearchLog:
    """Models that a search built. tried: (share of the MACs, points lost) of models with other budgets; shares:
    (share of the tokens kept, output loss) of models that merge other numbers of tokens; alone: what was predicted of
    units alone, where tokens were tried only because of it."""

    tried: tuple[tuple[float, float], ...] = ()
    shares: tuple[tuple[float, float], ...] = ()
    alone: str = ""


@dataclass(frozen=True)
class SearchResult:
    plan: Plan
    log: SearchLog


@dataclass(frozen=True)
class PruneResult:
    """The dense model in `model/`, counted on the model that was built.

    masked_difference: difference from the masked original before the repair, relative to the outputs. repairs: by
    group, with those of the output layer and of Gauss-Newton. finetuned: None if the recipe does not ask for it.
    """

    macs: int
    params: int
    masked_difference: float
    repairs: dict[str, Repair]
    finetuned: FineTune | None = None


@dataclass(frozen=True)
class EngineBuild:
    """How one engine was built; facts: facts from its library."""

    build_seconds: float
    facts: dict[str, Any]


@dataclass(frozen=True)
class BuildResult:
    engines: tuple[EngineResult, ...]


@dataclass(frozen=True)
class MeasureResult:
    """The engines' measurements, and the gates' results, which decide whether the run ships.

    candidates: with `engine: auto`, every engine that was considered.
    """

    measured: Measured
    gates: tuple[Gate, ...]
    candidates: tuple[CandidateResult, ...] = ()

    @property
    def passed(self) -> bool:
        return all(gate.passed for gate in self.gates)
