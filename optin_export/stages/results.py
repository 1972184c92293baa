"""What the stages hand on."""

from __future__ import annotations

from dataclasses import dataclass

from optin_export.measure import Gate, Measured


@dataclass(frozen=True)
class MeasureResult:
    """What was measured on the engines, and what the gates say of it: the verdict that ships or refuses."""

    measured: Measured
    gates: tuple[Gate, ...]

    @property
    def passed(self) -> bool:
        return all(gate.passed for gate in self.gates)
