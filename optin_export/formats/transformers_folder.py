"""`--format hf`: a folder for transformers' auto classes, with a modeling file for sizes that differ by layer."""

from __future__ import annotations

import contextlib
import copy
import importlib.util
import sys
from pathlib import Path
from typing import Any

import torch

from optin_export.formats.changes import Changes, Unlike
from optin_export.formats.original_files import copy_processors
from optin_export.formats.run import FinishedRun, OtherOutputs, check_outputs, unfit
from optin_export.formats.sources import modeling_file
from optin_export.models import auto_class, build_module
from optin_export.workdir.files import Scratch

MODULE = "modeling_pruned"
_INSTEAD = "use --format optimum, or onnx/ of the run with onnxruntime: the graph needs no modeling file"


def write_transformers(run: FinishedRun, folder: Path, name: str) -> None:
    """Write config.json, weights, modeling file, tokenizer and processor. name: of the format, for errors.

    Raises InputError if transformers' own class cannot become the pruned model, or computes something else.
    """
    try:
        changes = changes_of(run)
    except Unlike as error:
        raise unfit(run, name, str(error), _INSTEAD) from None
    try:
        _write(run, folder, name, changes, eager=False)
    except OtherOutputs:  # a library's implementations of attention may differ, and the run is of the eager one
        _write(run, folder, name, changes, eager=True)
    copy_processors(run, folder)


def _write(run: FinishedRun, folder: Path, name: str, changes: Changes, eager: bool) -> None:
    with contextlib.closing(Scratch()) as scratch:
        path = scratch.path / f"{MODULE}.py"
        path.write_text(modeling_file(run.base["class"], changes.replaced, eager), encoding="utf-8")
        cls = _class_in(path, run.base["class"])
        config = cls.config_class.from_dict(copy.deepcopy(run.base["config"]))
        cls.register_for_auto_class(auto_class(config, run.task).__name__)
        config.pruned, config.dtype = changes.data, torch.float32
        model = cls(config)
        model.load_state_dict(changes.state(run.model.model))
        model.save_pretrained(folder)
        again = copy.deepcopy(run.model)
        again.model = cls.from_pretrained(folder).eval()
        with torch.no_grad():
            check_outputs(run, name, again(**run.rows[0]))


def changes_of(run: FinishedRun) -> Changes:
    """What distinguishes the run's model from its library's. Raises Unlike."""
    if any(run.architecture.merged):
        raise Unlike("tokens are merged between its layers, which its library's code does not do")
    if "tower" in run.base:
        raise Unlike("it is one tower of a model with two, together with the texts of its classes")
    if "encoder" in run.base:
        raise Unlike("it is the encoder of a model that also has a decoder, which was not pruned")
    return Changes(build_module(run.base), run.model.model)


def _class_in(path: Path, name: str) -> Any:
    spec = importlib.util.spec_from_file_location(MODULE, path)
    assert spec is not None and spec.loader is not None
    # transformers finds the file of a class, which it copies, through sys.modules.
    sys.modules[MODULE] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return getattr(module, name)
