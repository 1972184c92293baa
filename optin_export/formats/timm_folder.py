"""`--format timm`: weights, config.json and a Python file that builds the model with timm."""

from __future__ import annotations

import copy
import importlib.util
import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from optin_export.formats.changes import Unlike
from optin_export.formats.run import FinishedRun, check_outputs, unfit
from optin_export.formats.sources import timm_file
from optin_export.formats.transformers_folder import changes_of
from optin_export.workdir.files import write_json, write_text

MODULE = "model"
#: What the evaluation transform of timm reads.
_TRANSFORM = ("input_size", "interpolation", "mean", "std", "crop_pct", "crop_mode")


def write_timm(run: FinishedRun, folder: Path, name: str) -> None:
    """Write config.json, model.safetensors and model.py. name: of the format, for errors.

    Raises InputError if timm's own model cannot become the pruned one, or computes something else.
    """
    try:
        changes = changes_of(run)
    except Unlike as error:
        raise unfit(run, name, str(error), "use onnx/ of the run with onnxruntime") from None
    write_json(folder / "config.json", _config(run, changes.data))
    state = {key: tensor.contiguous().clone() for key, tensor in changes.state(run.model.model).items()}
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    write_text(folder / f"{MODULE}.py", timm_file(changes.replaced))
    again = copy.deepcopy(run.model)
    again.model = _load(folder)
    inputs, _ = run.rows
    with torch.no_grad():
        check_outputs(run, name, again(**inputs))


def _config(run: FinishedRun, changes: dict[str, Any]) -> dict[str, Any]:
    """As timm writes it, with the changes of the pruned model."""
    model: Any = run.model.model
    served = run.folder / "preprocess" / "preprocess.json"
    used = json.loads(served.read_text(encoding="utf-8")) if served.is_file() else {}
    known = {**getattr(model, "pretrained_cfg", {}), **{key: used[key] for key in _TRANSFORM if key in used}}
    plain = {key: value for key, value in known.items() if key not in ("url", "hf_hub_id", "file", "hf_hub_filename")}
    return {
        "architecture": run.base["name"],
        "num_classes": getattr(model, "num_classes", None),
        "num_features": getattr(model, "num_features", None),
        "model_args": run.base["args"],
        "pretrained_cfg": json.loads(json.dumps(plain, default=str)),
        "pruned": changes,
    }


def _load(folder: Path) -> Any:
    spec = importlib.util.spec_from_file_location("_model_of_timm", folder / f"{MODULE}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.load()
