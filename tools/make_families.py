"""Write the tables of docs/families.md: from the families' files, and from docs/measurements/studies/breadth.json."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from optin_export.units import Family, supported

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "families.md"
BREADTH = ROOT / "docs" / "measurements" / "studies" / "breadth.json"
LOCK = ROOT / "requirements" / "dev.lock"
PROJECT = ROOT / "pyproject.toml"
#: How `Structure.family` names units that were found by measurement.
DISCOVERED = "discovered"
KINDS = ("heads", "neurons", "channels")


def main() -> None:
    PAGE.write_text(page(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
    print(PAGE)


def page(text: str, breadth: Path = BREADTH) -> str:
    """The page with its tables replaced; what is written between them stays."""
    measured = json.loads(breadth.read_text(encoding="utf-8"))
    for name, lines in (("families", family_table(supported())), ("architectures", architecture_table(measured))):
        start, end = f"<!-- table: {name} -->", "<!-- end -->"
        before, found, rest = text.partition(start)
        assert found, f"{PAGE} has no line {start!r}"
        text = before + "\n".join([start, *lines, end]) + rest.partition(end)[2]
    return text


def family_table(families: Iterable[Family]) -> list[str]:
    tested = dict(re.findall(r"^([\w-]+)==(\S+)$", LOCK.read_text(encoding="utf-8"), re.MULTILINE))
    oldest = dict(re.findall(r'^ *"([\w-]+)>=([\d.]+)', PROJECT.read_text(encoding="utf-8"), re.MULTILINE))
    rows = [
        [
            f"`{family.name}`",
            f"{family.library} {tested[family.library]}",
            oldest.get(family.library, "any"),
            re.sub(r"[\w/*-]*\*[\w*-]*", lambda found: f"`{found[0]}`", family.examples),
            ", ".join(family.units),
            _more(family) or "-",
        ]
        for family in families
    ]
    return _table(["family", "tested at", "oldest", "models", "units", "and also"], rows)


def architecture_table(measured: dict[str, Any]) -> list[str]:
    """One row per architecture that was pruned; then the names of the others."""
    rows = {name: row for name, row in measured["rows"].items() if "unbuilt" not in row}
    pruned = {name: row for name, row in rows.items() if row["code"] == 0}
    packages, budget = measured["environment"]["packages"], measured["budget"]
    lines = _table(
        ["architecture", "found", "by", "verified at", "floor"],
        [[f"`{name}`", _found(row), _by(row), _versions(row, packages), _floor(row, budget)]
         for name, row in pruned.items()],
    )  # fmt: skip
    others = [f"`{name}`" for name in rows.keys() - pruned.keys()]
    if others:
        lines += ["", f"Not pruned, with the reason in [breadth](breadth.md): {', '.join(sorted(others))}."]
    return lines


def _found(row: dict[str, Any]) -> str:
    whole = any(family.sublayers for family in supported() if family.name in row["family"].split(" + "))
    return ", ".join([*(kind for kind in KINDS if kind in row["units"]), *(["whole sub-layers"] if whole else [])])


def _more(family: Family) -> str:
    """What a family knows beyond units."""
    parts = ["whole sub-layers"] if family.sublayers else []
    parts += ["tokens"] if family.tokens is not None else []
    parts += ["dimensions of queries and keys"] if family.query_keys is not None else []
    parts += ["residual streams"] if family.streams is not None else []
    return ", ".join(parts)


def _by(row: dict[str, Any]) -> str:
    names = row["family"].split(" + ")
    known = [f"`{name}`" for name in names if name != DISCOVERED]
    return ", ".join([*known, *(["measurement"] if DISCOVERED in names else [])])


def _versions(row: dict[str, Any], packages: dict[str, str]) -> str:
    libraries = ["torch", *([row["library"]] if row["library"] in packages else [])]
    text = ", ".join(f"{name} {packages[name]}" for name in libraries)
    return f"differs: {text}" if row.get("check", {}).get("failed") else text


def _floor(row: dict[str, Any], budget: float) -> str:
    return f"{row['floor']:.2f}" if row.get("floor") is not None else f"below {budget:g}"


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    return [f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *rows)]


if __name__ == "__main__":
    main()
