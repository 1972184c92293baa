"""Measure the other work on the machine's CPUs during a timing.

A busy neighbour process affects every block: the interval and the noise floor stay narrow, but the ratio is that of
another machine (docs/method.md, section 6).
"""

from __future__ import annotations

import os
import time
from dataclasses import dataclass

import psutil

from optin_export.recipe import MOST_OTHER_WORK

#: Share of the machine's CPU time taken by other processes above which the machine counts as busy.
BUSY = MOST_OTHER_WORK


@dataclass(frozen=True)
class Neighbours:
    """Shares of the CPU time of all CPUs of the machine. others: processes other than this one. stolen: taken by the
    host of a virtual machine for other work."""

    others: float
    stolen: float

    @property
    def share(self) -> float:
        return self.others + self.stolen

    @property
    def busy(self) -> bool:
        return self.share > BUSY


class Watch:
    """Measures from its creation on."""

    def __init__(self) -> None:
        self._start = _read()

    def seen(self) -> Neighbours | None:
        """The shares since the creation; None if the system does not count them (a container may hide them)."""
        start, now = self._start, _read()
        if start is None or now is None:
            return None
        seconds, used, stolen, ours = (after - before for before, after in zip(start, now, strict=True))
        whole = seconds * (os.cpu_count() or 1)
        if whole <= 0:
            return None
        return Neighbours(others=min(1.0, max(0.0, (used - ours) / whole)), stolen=min(1.0, max(0.0, stolen / whole)))


def _read() -> tuple[float, float, float, float] | None:
    """Seconds now, and CPU seconds of all CPUs: used, stolen, and used by this process."""
    try:
        counts = psutil.cpu_times()._asdict()
    except (OSError, ValueError, TypeError):
        return None
    used = sum(counts.get(kind, 0.0) for kind in ("user", "nice", "system", "irq", "softirq"))
    ours = os.times()
    return time.monotonic(), used, counts.get("steal", 0.0), ours.user + ours.system
