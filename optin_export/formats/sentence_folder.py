"""`--format sentence-transformers`: a transformers folder with the modules from token states to the embedding."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import save_file

from optin_export.formats.graph_folder import write_token_states
from optin_export.formats.run import FinishedRun, unfit
from optin_export.formats.transformers_folder import write_transformers
from optin_export.models.sentence import encoder_class
from optin_export.models.tasks import TextModel
from optin_export.sentence import EMBEDDING, MODULES
from optin_export.workdir.files import write_json

_SETTINGS = "config_sentence_transformers.json"
#: Pooling by its name in a recipe -> (the library's name, its switch in files of earlier versions).
_POOLINGS = {
    "cls": ("cls", "cls_token"),
    "mean": ("mean", "mean_tokens"),
    "max": ("max", "max_tokens"),
    "mean_sqrt_len": ("mean_sqrt_len_tokens", "mean_sqrt_len_tokens"),
    "weightedmean": ("weightedmean", "weightedmean_tokens"),
    "last": ("lasttoken", "lasttoken"),
}
_CLASSES = {"pooling": "Pooling", "dense": "Dense", "layer_norm": "LayerNorm", "normalize": "Normalize"}


def write_sentence(run: FinishedRun, folder: Path, name: str) -> None:
    """Write the transformer, its modules and onnx/model.onnx. name: of the format, for errors.

    Raises InputError for a model without an embedding, or that transformers cannot build (`write_transformers`).
    """
    model = run.model
    if not isinstance(model, TextModel) or model.head is None:
        why = f"a model for {run.task} gives no embedding of a text that this library pools"
        raise unfit(run, name, why, "use --format hf")
    config: Any = model.model.config
    if encoder_class(config) is not None:
        why = f"this library builds the encoder of a {config.model_type} itself, without a modeling file"
        raise unfit(run, name, why, "use --format hf, whose model gives the states to pool")
    write_transformers(run, folder, name)
    write_token_states(run, folder, name)
    modules = [_entry(0, "Transformer", "")]
    for step, layer in zip(model.head.steps, model.head.layers, strict=True):
        if step["module"] == "truncate":
            continue  # a setting of the whole model
        kind = _CLASSES[step["module"]]
        modules.append(_entry(len(modules), kind, f"{len(modules)}_{kind}"))
        place = folder / modules[-1]["path"]
        place.mkdir()
        if kind != "Normalize" or step["output"] != EMBEDDING:
            write_json(place / "config.json", _config(run, step))
        if layer.state_dict():
            save_file(layer.state_dict(), place / "model.safetensors")
    write_json(folder / MODULES, modules)
    _write_settings(run, folder, model.head.steps)


def _write_settings(run: FinishedRun, folder: Path, steps: tuple[dict[str, Any], ...]) -> None:
    sentence: Mapping[str, Any] = run.base.get("sentence") or {}
    fed = sentence.get("fed") or {}
    transformer = {"max_seq_length": fed.get("max_length"), "do_lower_case": bool(fed.get("lower"))}
    write_json(folder / "sentence_bert_config.json", transformer)
    settings = run.files.settings(_SETTINGS) if run.files.name else {}
    cut = [step["dimension"] for step in steps if step["module"] == "truncate"]
    if fed.get("prompt"):
        settings = {"prompts": {"default": fed["prompt"]}, "default_prompt_name": "default", **settings}
    if cut:
        settings = {**settings, "truncate_dim": cut[-1]}
    write_json(folder / _SETTINGS, {"model_type": "SentenceTransformer", **settings})


def _entry(number: int, kind: str, path: str) -> dict[str, Any]:
    return {"idx": number, "name": str(number), "path": path, "type": f"sentence_transformers.models.{kind}"}


def _config(run: FinishedRun, step: Mapping[str, Any]) -> dict[str, Any]:
    kind = step["module"]
    if kind == "pooling":
        return _pooling(run, step)
    names = {"module_input_name": step["input"], "module_output_name": step["output"]}
    if kind == "dense":
        place = "linear" if step["activation"] == "Identity" else "activation"
        sizes = {"in_features": step["in"], "out_features": step["out"], "bias": step["bias"]}
        more = {"use_residual": True} if step.get("residual") else {}
        more |= names if {step["input"], step["output"]} != {EMBEDDING} else {}
        return {**sizes, "activation_function": f"torch.nn.modules.{place}.{step['activation']}", **more}
    if kind == "layer_norm":
        return {"dimension": step["dimension"]}
    return names


def _pooling(run: FinishedRun, step: Mapping[str, Any]) -> dict[str, Any]:
    config, modes = run.base["config"], step["modes"]
    if len(modes) > 1:  # joined in this order, which switches do not have
        chosen: dict[str, Any] = {"pooling_mode": [_POOLINGS[mode][0] for mode in modes]}
    else:
        chosen = {f"pooling_mode_{switch}": mode in modes for mode, (_, switch) in _POOLINGS.items()}
    width = next((config[name] for name in ("hidden_size", "dim", "d_model", "n_embd") if name in config), None)
    return {"word_embedding_dimension": width, **chosen, "include_prompt": step.get("include_prompt", True)}
