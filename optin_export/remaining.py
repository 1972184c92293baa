"""How much of a run is done, and the seconds that it still takes. The share never goes back."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence

#: Assumed seconds of a stage that no forecast covers: those are short, or said to be unknown.
SHORT = 2.0
#: Shares of the time before anything is known of the model.
USUAL = {"scoring": 10.0, "curves": 15.0, "surgery": 15.0, "export": 15.0, "measure": 40.0}
#: From this share of a stage on its own speed is trusted more than its forecast.
TRUSTED = 0.15
#: Limits of the ratio between the time that stages took and what was expected of them.
SLOWEST, FASTEST = 4.0, 0.5


class Remaining:
    """Follows one run through its stages. stages: their names in order. clock: seconds that only grow."""

    def __init__(self, stages: Sequence[str], clock: Callable[[], float] = time.monotonic) -> None:
        self.stages, self.clock = list(stages), clock
        self.expected: dict[str, float | None] = {}
        self.known = False
        self.stage, self.began, self.within = "", clock(), 0.0
        self.ended: dict[str, float] = {}
        self._phase, self._phases_end = (0.0, 1.0), 0.0
        self._pace: list[tuple[float, float]] = []
        self._most = 0.0

    def expect(self, seconds: Mapping[str, float | None]) -> None:
        """Stage -> expected seconds, None if unknown; a stage that is missing is short."""
        self.expected, self.known = dict(seconds), True

    def start(self, stage: str) -> None:
        if stage not in self.stages:
            self.stages.append(stage)
        self.stage, self.began, self.within = stage, self.clock(), 0.0
        self._phase, self._phases_end = (0.0, 1.0), 0.0

    def phase(self, until: float | None) -> None:
        """A phase with its own count of steps begins, after which the share `until` of the stage is done."""
        if until is not None:
            begin = self._phases_end
            self._phases_end = max(begin, min(until, 1.0))
            self._phase = (begin, self._phases_end)
            self.within = max(self.within, begin)

    def tick(self, done: int, total: int) -> None:
        begin, end = self._phase
        self.within = max(self.within, begin + (end - begin) * done / max(total, 1))

    def finish(self, stage: str, seconds: float, reused: bool) -> None:
        self.ended[stage] = seconds
        if self.stage == stage:
            self.stage = ""
        if not reused and (expected := self.expected.get(stage)):
            self._pace.append((seconds, expected))

    @property
    def share(self) -> float:
        """From 0 to 1, of the run's time; never less than it was."""
        every = {stage: self._weight(stage) for stage in self.stages}
        done = sum(every[stage] for stage in self.ended if stage in every)
        done += every.get(self.stage, 0.0) * self.within
        self._most = max(self._most, min(done / max(sum(every.values()), 1e-9), 1.0))
        return self._most

    @property
    def left(self) -> float | None:
        """Seconds until the run ends; None as long as nothing is known of it."""
        if not self.known:
            return None
        to_come = [one for one in self.stages if one not in self.ended and one != self.stage]
        return self._left_of_stage() + self._ratio() * sum(self._weight(one) for one in to_come)

    @property
    def at_least(self) -> bool:
        """Whether a stage of unknown length is still to come."""
        return any(one in self.expected and self.expected[one] is None for one in self.stages if one not in self.ended)

    def elapsed(self) -> float:
        """Seconds since the current stage began."""
        return self.clock() - self.began

    def _weight(self, stage: str) -> float:
        if not self.known:
            return USUAL.get(stage, SHORT)
        return SHORT if self.expected.get(stage) is None else max(self.expected[stage] or 0.0, 0.1)

    def _ratio(self) -> float:
        """How much slower the finished stages were than expected."""
        took, expected = (sum(column) for column in zip(*self._pace, strict=True)) if self._pace else (1.0, 1.0)
        return min(max(took / max(expected, 1e-9), FASTEST), SLOWEST)

    def _left_of_stage(self) -> float:
        if not self.stage:
            return 0.0
        elapsed = self.elapsed()
        if self.within >= TRUSTED:
            return elapsed * (1 - self.within) / self.within
        return max(self._ratio() * self._weight(self.stage) - elapsed, 0.0)
