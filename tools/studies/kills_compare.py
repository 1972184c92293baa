"""Whether two folders of `optin-export` hold the same, byte for byte where nothing was measured: for study_kills.py."""

from __future__ import annotations

import fnmatch
import hashlib
import json
from pathlib import Path
from typing import Any

#: Not compared -> why.
EXCLUDED = {
    "*.stages/lock": "says who holds the folder",
    "*.optin-export/lock": "an empty file that is locked",
    "*.stages/seconds.json": "how long stages took",
    "*measure/latency.json": "measured times",
    "*measure/footprint.json": "a measured time and memory",
    "*report.html": "report.json as a page, with its times",
}
#: Compared without these parts, which are times, or follow from times. Of a path, `*` is every entry.
WITHOUT: dict[str, tuple[tuple[str, ...], ...]] = {
    "*report.json": (
        ("created",),
        ("stages",),
        ("latency",),
        ("warnings",),
        ("verdict", "summary"),
        ("engines", "*", "build_seconds"),
    ),
    "*.stages/measure.json": (
        ("result",),
        ("sha256",),
        ("files", "measure/latency.json"),
        ("bytes", "measure/latency.json"),
    ),
    "*.stages/engines.*.json": (("result", "build_seconds"), ("sha256",)),
    "*.stages/ship.triton.json": (("files", "*manifest.json"),),
    "*manifest.json": (
        ("created",),
        ("instance",),
        ("files", "measure/footprint.json"),
        ("files", "measure/latency.json"),
        ("files", "report.json"),
        ("files", "report.html"),
        ("files", "triton/*manifest.json"),
    ),
}


def contents(folder: Path) -> dict[str, str]:
    """{file: sha256 of what is compared of it}; links and what else is no file by their kind."""
    found = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_symlink() or not (path.is_file() or path.is_dir()):
            found[name] = "no regular file"
        elif path.is_file():
            found[name] = _digest(path, name)
        elif not any(path.iterdir()):
            found[f"{name}/"] = "an empty folder"
    return found


def differences(expected: dict[str, str], found: dict[str, str]) -> list[str]:
    """What of two `contents` is not the same."""
    return sorted(
        f"{name}: {'missing' if name not in found else 'too much' if name not in expected else 'differs'}"
        for name in expected.keys() | found.keys()
        if expected.get(name) != found.get(name)
    )


def told(expected: dict[str, str]) -> dict[str, Any]:
    """For the result: which files were compared whole, without which parts, and which were not."""
    without = {name: [".".join(path) for path in paths] for name in expected if (paths := _taken_out(name))}
    excluded = {name: why for name in expected if (why := _excluded(name))}
    whole = [name for name in expected if name not in without and name not in excluded]
    return {"byte_for_byte": whole, "without": without, "excluded": excluded}


def _excluded(name: str) -> str | None:
    return next((why for pattern, why in EXCLUDED.items() if fnmatch.fnmatch(name, pattern)), None)


def _taken_out(name: str) -> tuple[tuple[str, ...], ...]:
    return next((paths for pattern, paths in WITHOUT.items() if fnmatch.fnmatch(name, pattern)), ())


def _digest(path: Path, name: str) -> str:
    if _excluded(name):
        return "excluded"
    data = path.read_bytes()
    if paths := _taken_out(name):
        value = json.loads(data)
        for one in paths:
            _take_out(value, one)
        data = json.dumps(value).encode()
    return hashlib.sha256(data).hexdigest()


def _take_out(value: Any, path: tuple[str, ...]) -> None:
    first, *rest = path
    if isinstance(value, list):
        for one in value if first == "*" else ():
            _take_out(one, tuple(rest))
    elif isinstance(value, dict):
        for key in fnmatch.filter(list(value), first):
            if rest:
                _take_out(value[key], tuple(rest))
            else:
                del value[key]
