"""Results of gates as JUnit XML, which CI services read."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING
from xml.etree import ElementTree

if TYPE_CHECKING:
    from optin_export.report.schema import GateResult

#: Characters that XML 1.0 does not allow; a message of a library may hold them.
_FORBIDDEN = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


def junit_xml(name: str, created: str, gates: Sequence[GateResult]) -> str:
    """One test suite for the run, one case for each gate; a missed or unevaluated gate is a failure."""
    missed = sum(not gate.passed for gate in gates)
    counts = {"tests": str(len(gates)), "failures": str(missed), "errors": "0", "skipped": "0", "time": "0"}
    root = ElementTree.Element("testsuites", counts)
    suite = ElementTree.SubElement(root, "testsuite", {"name": _clean(f"optin-export.{name}"), **counts})
    suite.set("timestamp", _clean(created))
    for gate in gates:
        known = "not evaluated" if gate.measured is None else f"{gate.measured:.4g}"
        text = _clean(f"{gate.name} {gate.condition}: {known} ({gate.note})")
        case = ElementTree.SubElement(
            suite,
            "testcase",
            {"classname": _clean(f"optin-export.{name}"), "name": _clean(f"{gate.name} ({gate.note})"), "time": "0"},
        )
        if gate.passed:
            ElementTree.SubElement(case, "system-out").text = text
        else:
            kind = "NotEvaluated" if gate.measured is None else "GateMissed"
            ElementTree.SubElement(case, "failure", {"type": kind, "message": text}).text = text
    ElementTree.indent(root)
    return '<?xml version="1.0" encoding="UTF-8"?>\n' + ElementTree.tostring(root, encoding="unicode") + "\n"


def _clean(text: str) -> str:
    return _FORBIDDEN.sub("?", text)
