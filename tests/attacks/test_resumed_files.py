"""A run folder by anybody, with records that fit its files: what a resumed run reads of it is checked all the same."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from optin_export.workdir.files import sha256_file, sha256_json
from tests.attacks.attempt import attempt
from tests.attacks.conftest import Count, Folder
from tests.attacks.matrix import some

Change = Callable[[Any], Any]


def group(**fields: Any) -> Change:
    """The plan's first group of units with other fields."""

    def change(plan: dict[str, Any]) -> dict[str, Any]:
        name = next(iter(plan["groups"]))
        return {**plan, "groups": {**plan["groups"], name: {**plan["groups"][name], **fields}}}

    return change


def with_fields(**fields: Any) -> Change:
    return lambda value: {**value, **fields}


def base(**fields: Any) -> Change:
    return lambda value: {**value, "base": {**value["base"], **fields}}


FORGERIES: dict[str, tuple[str, Change]] = {
    "indices beyond the end": ("plan/plan.json", group(kept=[10**9])),
    "indices below zero": ("plan/plan.json", group(kept=[-1])),
    "indices twice": ("plan/plan.json", group(kept=[0, 0])),
    "huge indices": ("plan/plan.json", group(count=2**70, kept=[2**69])),
    "more units than there are": ("plan/plan.json", group(count=10**6, kept=[0])),
    "no units": ("plan/plan.json", with_fields(groups={})),
    "groups that lead elsewhere": ("plan/plan.json", with_fields(groups={"../../x": {"count": 1, "kept": [0]}})),
    "a plan that is a list": ("plan/plan.json", lambda value: [value]),
    "an unknown field": ("plan/plan.json", with_fields(evil=1)),
    "another model": ("model/architecture.json", base(name="resnet18", args={})),
    "a million blocks": ("model/architecture.json", base(args={"depth": 10**6})),
    "a size of 2^40": ("model/architecture.json", base(args={"embed_dim": 2**40})),
    "files of this machine": ("model/architecture.json", base(args={"checkpoint_path": "/etc/passwd"})),
    "the hub": ("model/architecture.json", base(name="hf-hub:evil/x")),
    "a folder": ("model/architecture.json", base(name="local-dir:/etc")),
    "a class of transformers": (
        "model/architecture.json",
        lambda value: {
            **value,
            "base": {**value["base"], "library": "transformers", "class": "pipeline", "config": {}},
        },
    ),
    "no base": ("model/architecture.json", lambda value: {**value, "base": None}),
    "an architecture that is a list": ("model/architecture.json", lambda value: [value]),
    "layers that are none": ("model/architecture.json", lambda value: {key: [1] for key in value}),
}


def forge(run: Path, name: str, change: Change) -> str:
    """The file changed, and the records of the run as if it had been written so."""
    path = run / name
    path.write_text(json.dumps(change(json.loads(path.read_text()))))
    for record in (run / ".stages").glob("*.json"):
        entry = json.loads(record.read_text())
        if name in entry.get("files", {}):
            entry["files"][name] = sha256_file(path)
            entry["bytes"][name] = path.stat().st_size
            record.write_text(json.dumps({**entry, "sha256": sha256_json(entry["result"])}))
    return path.read_text()


@pytest.mark.parametrize("kind", some(list(FORGERIES), 19))
def test_refused_or_made_again(kind: str, copied: Folder, count: Count) -> None:
    folder = copied("half")
    name, change = FORGERIES[kind]
    forged = forge(folder / "run", name, change)
    (folder / "run" / ".stages" / "export.pruned.json").unlink(missing_ok=True)
    for made in (folder / "run" / ".stages").glob("surgery*" if name.startswith("plan") else "no-such"):
        made.unlink()
    count("forged records")
    found = attempt([folder / "recipe.yaml", "--out", folder / "run", "--stop-after", "export", "--quiet"])
    assert found.is_harmless, found.told
    if found.code == 0:  # made again from the recipe
        assert (folder / "run" / name).read_text() != forged
    else:
        assert found.is_clean, found.told
