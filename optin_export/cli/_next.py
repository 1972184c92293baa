"""What to do after a run: exact commands, for every way in which it can end."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from optin_export.cli._group import PROGRAM

if TYPE_CHECKING:
    from optin_export.recipe import Recipe
    from optin_export.report.schema import GateResult, Report


@dataclass(frozen=True)
class Command:
    """The command line of a run. out: its --out; None: the default."""

    recipe: str
    out: Path | None = None
    overrides: Sequence[str] = ()

    def __str__(self) -> str:
        return self.adding()

    def adding(self, *words: str) -> str:
        """The command with further words."""
        out = () if self.out is None else ("--out", str(self.out))
        sets = [word for override in self.overrides for word in ("--set", override)]
        return shlex.join([PROGRAM, self.recipe, *out, *sets, *words])

    def setting(self, field: str, value: object) -> str:
        """The command with another value of a field."""
        others = tuple(one for one in self.overrides if one.partition("=")[0] != field)
        return Command(self.recipe, self.out, others).adding("--set", f"{field}={value}")


def next_steps(report: Report, recipe: Recipe, folder: Path, command: Command) -> list[str]:
    """Commands with the reason for each; first what the run's outcome asks for.

    command: of the run that ended.
    """
    missed = [gate for gate in report.verdict.gates if not gate.passed]
    if not missed and report.quick:
        return [f"{command}   (a full measurement, before you rely on this one)"]
    if not missed:
        format = format_of(folder)
        if format is None:
            return []
        return [f"{PROGRAM} export {shlex.quote(str(folder))} --format {format}   (loads without optin_export)"]
    parity = [gate for gate in missed if gate.kind == "parity"]
    if parity:
        return [_after_parity(parity[0], recipe, command)]
    steps = []
    if any(gate.measured is None and "other work" in gate.note for gate in missed):
        steps.append(f"stop the other work on this machine, then: {command.adding('--redo', 'measure')}")
    slow = any(gate.measured is not None and "speedup" in gate.name for gate in missed)
    lossy = any(gate.measured is not None and gate.name.startswith("accuracy_drop") for gate in missed)
    macs = recipe.prune.budget.macs
    if macs is not None and slow and lossy:
        field = "prune.budget.macs"
        values = ", ".join(f"{one:g}" for one in (round((1 + macs) / 2, 2), macs, round(0.7 * macs, 2)))
        sweep = Command(command.recipe, None, command.overrides).setting("sweep", f"{{{field}: [{values}]}}")
        steps.append(f"{sweep}   (no budget may meet both limits: shows what each costs)")
    elif macs is not None and slow:
        less = command.setting("prune.budget.macs", f"{0.7 * macs:.2g}")
        steps.append(f"{less}   (removes more)")
    elif macs is not None and lossy:
        more = command.setting("prune.budget.macs", f"{(1 + macs) / 2:.2g}")
        steps.append(f"{more}   (removes less; more calibration rows also help: data.calibration.samples)")
    return steps or [f"{PROGRAM} explain gates   (what each limit means; the report says what was measured)"]


def _after_parity(gate: GateResult, recipe: Recipe, command: Command) -> str:
    precision = recipe.export.precision
    if gate.name != "parity" and precision not in ("fp32", "fp16"):
        return f"{command.setting('export.precision', 'fp16' if recipe.here[0].device == 'cuda' else 'fp32')}   " + (
            f"({precision} changes this model's outputs too much)"
        )
    return f"{PROGRAM} doctor {shlex.quote(command.recipe)}   (an engine computes something else than torch)"


def format_of(folder: Path) -> str | None:
    """The format in which the library of the run's model loads it; None where no library can."""
    from optin_export.workdir.files import read_json

    architecture = read_json(folder / "model" / "architecture.json")
    base = architecture["base"]
    if "tower" in base or "encoder" in base or any(architecture["merged"]):
        return None
    if base["task"] == "feature-extraction" and base["library"] == "transformers":
        return "sentence-transformers"
    return {"transformers": "hf", "timm": "timm"}.get(base["library"])
