"""Write docs/licences.md: every package that this one needs, directly or not, with the licence it declares.

Read from the installed environment, with the extras named below; run it where they are installed.
"""

from __future__ import annotations

import importlib.metadata
import tomllib
from importlib.metadata import Distribution
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "licences.md"
HEAD = """# Licences of the dependencies

As the packages declare them, read from an installed environment by `python tools/make_licences.py`. This package itself
is Apache-2.0. *Direct* packages are named in `pyproject.toml`; a list under *not installed* was not read.

| package | licence | needed |
|---|---|---|
"""


def direct() -> dict[str, str]:
    """Canonical name -> 'always', or the extras that name it."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    found = {canonicalize_name(Requirement(line).name): "always" for line in project["dependencies"]}
    for extra, lines in project["optional-dependencies"].items():
        for line in lines:
            name = canonicalize_name(Requirement(line).name)
            before = found.get(name)
            found[name] = f"extra {extra}" if before is None else before if before == "always" else f"{before}, {extra}"
    return found


def licence(package: Distribution) -> str:
    """Its SPDX expression; else the classifiers; else the first line of the old field."""
    meta = package.metadata
    expression = meta.get("License-Expression")
    if expression:
        return str(expression)
    classes = [line.rpartition(" :: ")[2] for line in meta.get_all("Classifier") or () if line.startswith("License ::")]
    names = [name for name in classes if name != "OSI Approved"]
    text = (meta.get("License") or "").strip().splitlines()
    return ", ".join(names) if names else text[0][:60].replace("|", "/") if text else "not declared"


def closure(names: set[str]) -> tuple[dict[str, Distribution], set[str]]:
    """Installed packages that these need, by canonical name, and those of them that are not installed."""
    found: dict[str, Distribution] = {}
    missing: set[str] = set()
    todo = sorted(names)
    while todo:
        name = todo.pop()
        if name in found or name in missing:
            continue
        try:
            found[name] = importlib.metadata.distribution(name)
        except importlib.metadata.PackageNotFoundError:
            missing.add(name)
            continue
        for line in found[name].requires or ():
            needed = Requirement(line)
            if needed.marker is None or needed.marker.evaluate({"extra": ""}):
                todo.append(canonicalize_name(needed.name))
    return found, missing


def page() -> str:
    wanted = direct()
    found, missing = closure(set(wanted))
    rows = [f"| {name} | {licence(found[name])} | {wanted.get(name, 'by others')} |" for name in sorted(found)]
    absent = [f"`{name}` ({wanted[name]})" for name in sorted(missing & set(wanted))]
    tail = f"\nNot installed: {', '.join(absent)}.\n" if absent else ""
    return HEAD + "\n".join(rows) + "\n" + tail


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
    print(f"wrote {PAGE.relative_to(ROOT)}")
