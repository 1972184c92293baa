"""modules.json as steps: the operation of each sentence-transformers module on the preceding features."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from optin_export.errors import InputError
from optin_export.sentence.files import MODULES, Files, inside

EMBEDDING, TOKENS = "sentence_embedding", "token_embeddings"
#: How sentence-transformers calls the poolings of `model.pooling`; older files name several by one switch each, and
#: join them in this order.
POOLINGS = {
    "cls": "cls",
    "max": "max",
    "mean": "mean",
    "mean_sqrt_len_tokens": "mean_sqrt_len",
    "weightedmean": "weightedmean",
    "lasttoken": "last",
}
_SWITCHES = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len",
    "pooling_mode_weightedmean_tokens": "weightedmean",
    "pooling_mode_lasttoken": "last",
}
_PREFIX = "sentence_transformers."

Step = dict[str, Any]


def listed_modules(files: Files, modules: Any) -> list[tuple[str, str]]:
    """(class name, path) of every module. Raises InputError for a class that is not sentence-transformers' own."""
    try:
        listed = [(str(module["type"]), inside(module["path"], files.name)) for module in modules]
    except (KeyError, TypeError):
        raise InputError(
            f"cannot read {MODULES} of {files.name}",
            "it is not a list of modules with type and path",
            "restore that file",
        ) from None
    for kind, _ in listed:
        if not kind.startswith(_PREFIX):
            raise refusal(files.name, kind, "it is not a module of sentence-transformers itself")
    return [(kind.rpartition(".")[2], path) for kind, path in listed]


def refusal(name: str, kind: str, why: str) -> InputError:
    """The error for a module, by its name, that cannot be built into the graph."""
    return InputError(
        f"the module {kind} of {name} is not supported",
        why,
        "use a model of Transformer, Pooling, Dense, LayerNorm and Normalize modules",
    )


def read_steps(files: Files, listed: list[tuple[str, str]]) -> tuple[list[Step], dict[int, Path]]:
    """The steps after the Transformer, and the weights file of each step that has one, by its index.

    Raises InputError for an unsupported module, and if the modules output no embedding.
    """
    steps: list[Step] = []
    weights: dict[int, Path] = {}
    known = {TOKENS}
    for kind, path in listed:
        step = _step(files, kind, files.settings(f"{path}/config.json"))
        if step is None or (kind == "Normalize" and step["input"] not in known):  # the library skips it too
            continue
        if step["input"] not in known:
            raise refusal(files.name, kind, f"it reads '{step['input']}', which no earlier module returns")
        known.add(step["output"])
        if kind in ("Dense", "LayerNorm"):
            weights[len(steps)] = _weights(files, kind, path)
        steps.append(step)
    if EMBEDDING not in known:
        raise InputError(
            f"{files.name} has no sentence embedding", f"{MODULES} lists no Pooling module", "use another model"
        )
    return steps, weights


def _weights(files: Files, kind: str, path: str) -> Path:
    for name in ("model.safetensors", "pytorch_model.bin"):
        found = files.find(f"{path}/{name}")
        if found is not None:
            return found
    raise InputError(
        f"the weights of the module {kind} of {files.name} are missing",
        f"'{path}' holds neither model.safetensors nor pytorch_model.bin",
        "restore that file",
    )


def _step(files: Files, kind: str, config: dict[str, Any]) -> Step | None:
    """A module as a step; None for one that does nothing when a model is used. Raises InputError for others."""
    config = dict(config)
    before = config.pop("module_input_name", EMBEDDING)
    after = config.pop("module_output_name", None) or before
    try:
        if kind == "Dropout":
            return None
        if kind == "Normalize":
            return {"module": "normalize", "input": before, "output": after}
        if kind == "LayerNorm":
            return {"module": "layer_norm", "input": before, "output": after, "dimension": int(config["dimension"])}
        if kind == "Pooling":
            return {"module": "pooling", "input": TOKENS, "output": EMBEDDING, **_pooling(config)}
        if kind == "Dense":
            # The default of the library's own class.
            given = config.get("activation_function", "torch.nn.modules.activation.Tanh")
            activation = activation_name(given)
            if activation is None:
                raise refusal(files.name, f"Dense with the activation {given}", "it is not an activation of torch.nn")
            return {
                "module": "dense",
                "input": before,
                "output": after,
                "in": int(config["in_features"]),
                "out": int(config["out_features"]),
                "bias": bool(config.get("bias", True)),
                "activation": activation,
                "residual": bool(config.get("use_residual", False)),
            }
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(
            f"cannot read the module {kind} of {files.name}", f"{type(error).__name__}: {error}", "restore its files"
        ) from None
    raise refusal(files.name, kind, "its computation cannot be added to the graph")


def activation_name(path: Any) -> str | None:
    """'Tanh' from 'torch.nn.modules.activation.Tanh'; None for a path outside torch.nn."""
    text = str(path)
    return text.rpartition(".")[2] if text.startswith("torch.nn.") else None


def _pooling(config: dict[str, Any]) -> Step:
    for width in ("embedding_dimension", "word_embedding_dimension"):
        config.pop(width, None)
    include = bool(config.pop("include_prompt", True))
    switched = [name for key, name in _SWITCHES.items() if config.pop(key, False)]
    given = config.pop("pooling_mode", None)
    if config:
        raise ValueError(f"unknown setting '{next(iter(config))}'")
    if given is None:
        return {"modes": switched or ["mean"], "include_prompt": include}
    names = [given] if isinstance(given, str) else list(given)
    unknown = next((name for name in names if name not in POOLINGS), None)
    if unknown is not None or not names:
        raise ValueError(f"unknown pooling_mode '{unknown}'")
    return {"modes": [POOLINGS[name] for name in names], "include_prompt": include}
