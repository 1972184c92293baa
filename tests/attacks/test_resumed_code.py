"""A run folder may come from anybody: as it is resumed, Python is run only if the user's own recipe names that file."""

from __future__ import annotations

import contextlib
import json
import pickle
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import optin_export
from optin_export.engines.torch import _plain_pickles, check_program
from optin_export.errors import InputError
from optin_export.recipe import validate
from optin_export.stages import prune_and_repair
from optin_export.stages.context import RunContext
from optin_export.workdir.files import sha256_file
from tests.attacks.conftest import Count
from tests.attacks.matrix import some
from tests.conftest import Make


@pytest.fixture
def mark(tmp_path: Path) -> Path:
    """Exists once code that should not run has run."""
    return tmp_path / "it-ran"


@pytest.fixture
def evil(tmp_path: Path, mark: Path) -> Path:
    path = tmp_path / "received" / "evil.py"
    path.parent.mkdir()
    path.write_text(f"open({str(mark)!r}, 'w').close()\ndef make(**args):\n    raise SystemExit\n")
    return path


def forge(run: Path, base: dict[str, Any]) -> None:
    """Another architecture, with the records of the run telling that it is as it was written."""
    path = run / "model" / "architecture.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "base": base}))
    for record in (run / ".stages").glob("*.json"):
        entry = json.loads(record.read_text())
        if "model/architecture.json" in entry.get("files", {}):
            entry["files"]["model/architecture.json"] = sha256_file(path)
            entry["bytes"]["model/architecture.json"] = path.stat().st_size
            record.write_text(json.dumps(entry))


#: What a forged architecture names; FOLDER holds the file, and a link to it.
FORGERIES = {
    "the file": "py:FOLDER/received/evil.py:make",
    "a link to it": "py:FOLDER/link.py:make",
    "a relative path": "py:received/evil.py:make",
    "a way around": "py:FOLDER/received/../received/evil.py:make",
    "a module": "py:received.evil:make",
    "a module of Python": "py:os:system",
    "a builtin": "py:builtins:exec",
    "no prefix": "FOLDER/received/evil.py:make",
    "another case": "PY:FOLDER/received/evil.py:make",
}


@pytest.fixture
def run(finished_vit: Path, tmp_path: Path) -> Path:
    """A copy of a finished run of `vit_recipe()`."""
    return Path(shutil.copytree(finished_vit, tmp_path / "run"))


@pytest.mark.parametrize("kind", some(list(FORGERIES), 9))
def test_a_forged_architecture_runs_nothing(
    kind: str,
    run: Path,
    vit_recipe: Make,
    evil: Path,
    mark: Path,
    tmp_path: Path,
    count: Count,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "link.py").symlink_to(evil)
    forge(run, {"library": "python", "source": FORGERIES[kind].replace("FOLDER", str(tmp_path)), "args": {}})
    count("resumed code")
    with pytest.raises(InputError, match="not the model of the recipe"):
        optin_export.run(vit_recipe(), run, stop_after="export")
    assert not mark.exists()


def test_a_forged_model_before_the_fine_tune(
    run: Path, vit_recipe: Make, evil: Path, mark: Path, tmp_path: Path
) -> None:
    forge(run, {"library": "python", "source": f"py:{evil}:make", "args": {}})
    (run / "model").rename(run / "repaired")
    work = RunContext(validate(vit_recipe(), tmp_path), run, False)
    with pytest.raises(InputError, match="not the model of the recipe"):
        prune_and_repair.pruning.load_model(run / "repaired", work.python)
    assert not mark.exists()


@pytest.mark.parametrize("change", some(["source", "args", "link", "function"], 4))
def test_only_the_very_function_that_the_recipe_names(
    change: str, vit_recipe: Make, evil: Path, mark: Path, tmp_path: Path, count: Count
) -> None:
    """The recipe names a file of its own; the folder names another one, or the same with other arguments."""
    from tests.conftest import VIT_ARGS

    own = tmp_path / "own.py"
    own.write_text(
        "import timm\n"
        f"def make(note=''):\n    open({str(mark)!r}, 'w').close() if note else None\n"
        f"    return timm.create_model('vit_tiny_patch16_224', pretrained=False, **{VIT_ARGS!r})\n"
        f"def other(**args):\n    open({str(mark)!r}, 'w').close()\n"
    )
    section = {**vit_recipe()["model"], "source": f"py:{own}:make", "args": {}}
    # The cheapest scores, allocation and repair: the model is loaded after them.
    prune = {"budget": {"macs": 0.6}, "score": "magnitude", "allocation": "additive", "compensate": False}
    recipe = vit_recipe(model=section, prune=prune)
    run = tmp_path / "run"
    optin_export.run(recipe, run, stop_after="surgery")
    base = json.loads((run / "model" / "architecture.json").read_text())["base"]
    (tmp_path / "link.py").symlink_to(own)
    forge(
        run,
        {
            **base,
            **{
                "source": {"source": f"py:{evil}:make"},
                "args": {"args": {"note": "x"}},
                "link": {"source": f"py:{tmp_path / 'link.py'}:make"},
                "function": {"source": f"py:{own}:other"},
            }[change],
        },
    )
    count("resumed code")
    with pytest.raises(InputError, match="not the model of the recipe"):
        optin_export.run(recipe, run, stop_after="export")
    assert not mark.exists()
    if change == "source":  # and what the recipe does name is run
        forge(run, base)
        optin_export.run(recipe, run, stop_after="export")


class Payload:
    """Unpickled, it makes a file."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[str, str]]:
        return open, (self.path, "w")


@pytest.mark.parametrize("prefix", some(["opaque_obj_0", "custom_obj_0", "../x", "OPAQUE_OBJ_0"], 4))
def test_a_program_with_an_object_in_it(prefix: str, tmp_path: Path, mark: Path, count: Count) -> None:
    """torch.export unpickles objects beside the tensors without any restriction."""
    program = torch.export.export(torch.nn.Linear(2, 2), (torch.ones(1, 2),))
    whole, forged = tmp_path / "whole.pt2", tmp_path / "forged.pt2"
    torch.export.save(program, whole)
    check_program(whole)
    entry = {"path_name": prefix, "is_param": False, "use_pickle": True, "tensor_meta": None}
    with zipfile.ZipFile(whole) as source, zipfile.ZipFile(forged, "w") as target:
        for one in source.infolist():
            data = source.read(one)
            if one.filename.endswith("constants_config.json"):
                data = json.dumps({"config": {"c": entry}}).encode()
                target.writestr(one.filename.rpartition("/")[0] + f"/{prefix}", pickle.dumps(Payload(str(mark))))
            target.writestr(one, data)
    count("resumed code")
    with pytest.raises(ValueError, match="not a tensor"):
        check_program(forged)
    if prefix == "opaque_obj_0":
        with _plain_pickles(), contextlib.suppress(Exception):  # whatever torch says afterwards
            torch.export.load(forged)
        assert mark.exists()  # the reason for the check: once torch needs it no more, this tells
