"""What studies share: the files of their results, the machine that those name, and the inputs that a run keeps."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from optin_export.environment import describe

if TYPE_CHECKING:
    import numpy as np

FOLDER = Path(__file__).resolve().parents[2] / "docs" / "measurements" / "studies"


def machine(*packages: str) -> dict[str, str]:
    """The processor, and the versions of these packages."""
    found = describe()
    return {"cpu": found["cpu"], **{name: found["packages"][name] for name in packages}}


def saved_rows(name: str) -> list[dict[str, Any]]:
    """The rows of docs/measurements/studies/NAME.json; none without that file."""
    path = FOLDER / f"{name}.json"
    rows: list[dict[str, Any]] = json.loads(path.read_text(encoding="utf-8"))["rows"] if path.exists() else []
    return rows


def saved_facts(name: str) -> dict[str, Any]:
    """What the same file says of all of its rows."""
    found: dict[str, Any] = json.loads((FOLDER / f"{name}.json").read_text(encoding="utf-8"))
    return {key: value for key, value in found.items() if key != "rows"}


def save(name: str, content: dict[str, Any]) -> None:
    """Write docs/measurements/studies/NAME.json."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    (FOLDER / f"{name}.json").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def inputs_of(run: Path) -> dict[str, np.ndarray]:
    """The real rows at the shipped shape that a run keeps."""
    from safetensors.numpy import load_file

    stored = load_file(run / "measure" / "reference.safetensors")
    return {name.removeprefix("input."): rows for name, rows in stored.items() if name.startswith("input.")}
