"""Manifests by anybody: names that lead elsewhere, entries that are none, files that are not theirs."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.attacks.attempt import attempt
from tests.attacks.conftest import Count, Folder
from tests.attacks.matrix import ALL

ENTRY = {"sha256": "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855", "bytes": 0}
Forge = Callable[[dict[str, Any]], Any]


def named(name: str) -> Forge:
    """One more file, of no bytes."""
    return lambda manifest: {**manifest, "files": {**manifest["files"], name: ENTRY}}


def entry(**changes: Any) -> Forge:
    """The first file's entry changed."""

    def forge(manifest: dict[str, Any]) -> dict[str, Any]:
        name, one = next(iter(manifest["files"].items()))
        return {**manifest, "files": {**manifest["files"], name: {**one, **changes}}}

    return forge


def missing(manifest: dict[str, Any]) -> dict[str, Any]:
    name = next(iter(manifest["files"]))
    return {**manifest, "files": {key: value for key, value in manifest["files"].items() if key != name}}


FORGERIES: dict[str, Forge] = {
    "a way out": named("../../outside"),
    "a way out and back": named("../run/x"),
    "a place": named("/etc/passwd"),
    "a device": named("/dev/zero"),
    "nothing": named(""),
    "a dot": named("."),
    "a folder": named("onnx"),
    "a slash at the end": named("new/"),
    "a NUL": named("a\0b"),
    "a terminal": named("\x1b[2J\x1b]0;x\x07"),
    "markup": named("[red]x[/red]"),
    "lines": named("x\nerror: y"),
    "right to left": named("a\u202egpj.exe"),
    "looks the same": named("mаnifest.json"),
    "half a character": named("\ud800"),
    "another form": named("e\u0301.onnx"),
    "long": named("x" * 5000),
    "deep": named("a/" * 2000 + "b"),
    "itself": named("manifest.json"),
    "one too few": missing,
    "another hash": entry(sha256="0" * 64),
    "no hash": entry(sha256=None),
    "a number as hash": entry(sha256=7),
    "another size": entry(bytes=1),
    "a size below zero": entry(bytes=-1),
    "a huge size": entry(bytes=2**70),
    "half a byte": entry(bytes=0.5),
    "a list": lambda manifest: {**manifest, "files": [1, 2]},
    "no files": lambda manifest: {"version": 1},
    "an entry that is text": lambda manifest: {**manifest, "files": {"report.json": "x"}},
    "environment is text": lambda manifest: {**manifest, "environment": "x"},
    "packages are a list": lambda manifest: {**manifest, "environment": {"packages": [1]}},
    "many": lambda manifest: {**manifest, "files": {f"f{at}": ENTRY for at in range(20_000)}},
}
COMMANDS = {
    "verify": "verify RUN",
    "check": "check RUN",
    "ship": "ship RUN --to to",
    "measure": "measure RUN --quiet",
    "client": "client 127.0.0.1:9 --model a --model b --run RUN --import-perf-analyzer RUN/recipe.yaml RUN/recipe.yaml",
    "a repository": "verify IN/models",
    "ship over it": "ship RUN --to IN/models",
    "roll it back": "rollback IN/models tiny",
}
#: What these read is not all that was forged: an entry for a file that they do not need, or what is put back.
PARTLY = ("ship", "measure", "roll it back")
CASES = [(kind, command) for kind in FORGERIES for command in COMMANDS]


@pytest.mark.parametrize(("kind", "command"), CASES if ALL else CASES[::61])
def test_forged(kind: str, command: str, copied: Folder, count: Count, short_measurement: None) -> None:
    folder = copied("models" if "IN" in COMMANDS[command] else "run")
    run = folder if "IN" not in COMMANDS[command] else Path.cwd() / "no-run"
    if "RUN" in COMMANDS[command] and not run.exists():
        run = copied("run")
    path = folder / "manifest.json" if folder == run else folder / "models" / "tiny" / "manifest.json"
    path.write_text(json.dumps(FORGERIES[kind](json.loads(path.read_text()))))
    count("manifests")
    found = attempt([word.replace("RUN", str(run)).replace("IN/", f"{folder}/") for word in COMMANDS[command].split()])
    if command in PARTLY and found.out:
        assert found.is_harmless, found.told
    elif command in ("verify", "a repository") and found.out:
        assert found.is_harmless and found.code == 2, found.told
    else:
        assert found.is_clean, found.told
