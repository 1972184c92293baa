"""Adds up the attempts of this folder by kind, and how many were refused cleanly."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest

Count = Callable[[str], None]


@pytest.fixture
def count(record_property: Callable[[str, object], None]) -> Count:
    """Call it with an attempt's kind before the attempt; it is clean if the test passes."""
    return lambda kind: record_property("attack_kind", kind)


def pytest_terminal_summary(terminalreporter: Any) -> None:
    attempts, clean = Counter[str](), Counter[str]()
    for reports in terminalreporter.stats.values():
        for report in reports:
            if getattr(report, "when", "") == "call":
                for name, kind in report.user_properties:
                    if name == "attack_kind":
                        attempts[str(kind)] += 1
                        clean[str(kind)] += report.passed
    for kind, number in sorted(attempts.items()):
        terminalreporter.write_line(f"attacks: {kind}: {clean[kind]} of {number} refused cleanly")
    if attempts:
        terminalreporter.write_line(f"attacks: {clean.total()} of {attempts.total()} in all")
