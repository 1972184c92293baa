"""Where models come from: the hub or a folder (`hf:`), timm (`timm:`), or the user's own function (`py:`)."""

from __future__ import annotations

import difflib
import importlib
import importlib.util
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from torch import nn

from optin_export.errors import InputError
from optin_export.recipe import ModelSection
from optin_export.sentence import SentenceFolder, find_sentence_folder, transformer_folder
from optin_export.sources.adapt import checked, readable, refuse_quantised_config
from optin_export.sources.contrastive import build_tower, is_contrastive, take_tower
from optin_export.sources.equivalents import use_equivalents
from optin_export.sources.guard import READS_FILES, plain_config, refuse_packed
from optin_export.sources.sentence import encoder_class
from optin_export.sources.sentence_model import wrap_sentence
from optin_export.sources.tasks import TaskModel, wrap
from optin_export.sources.tokenizer import load_tokenizer

_AUTO_CLASS = {
    "feature-extraction": "AutoModel",
    "text-classification": "AutoModelForSequenceClassification",
    "token-classification": "AutoModelForTokenClassification",
    "question-answering": "AutoModelForQuestionAnswering",
    "fill-mask": "AutoModelForMaskedLM",
    "text-generation": "AutoModelForCausalLM",
    "image-classification": "AutoModelForImageClassification",
    "image-feature-extraction": "AutoModel",
    "zero-shot-image-classification": "AutoModelForZeroShotImageClassification",
    "image-segmentation": "AutoModelForSemanticSegmentation",
}

#: `hf:model_type=bert`: an architecture of transformers without a checkpoint.
_BY_TYPE = "model_type="


@runtime_checkable
class _HasAttention(Protocol):
    """transformers models: the attention implementation can be chosen."""

    def set_attn_implementation(self, name: str) -> None: ...


@dataclass(frozen=True)
class LoadedModel:
    """A model with all that is needed to build it again without its weights.

    architecture: JSON-serialisable; `build(architecture)` gives the same modules with random weights.
    origin: folder or hub name where tokenizer and preprocessing lie, if any. labels: class names by index, if known.
    sentence: what sentence-transformers does around the model, where it is one of its folders. warnings: one line each.
    """

    model: TaskModel
    architecture: dict[str, Any]
    origin: str | None = None
    labels: dict[str, int] = field(default_factory=dict)
    sentence: SentenceFolder | None = None
    warnings: tuple[str, ...] = ()


def load_model(section: ModelSection, seed: int = 0) -> LoadedModel:
    """Load the model of a recipe in float32 on the CPU, in eval mode and with eager attention.

    Raises InputError for a missing or unreadable model, an unknown architecture, or weights that do not fit.
    """
    if section.source.startswith("/"):  # a bare path, made absolute by the recipe
        prefix, rest = _kind_of_folder(Path(section.source)), section.source
    else:
        prefix, _, rest = section.source.partition(":")
    torch.manual_seed(seed)  # for weights: random
    sentence, warnings = find_sentence_folder(rest if prefix == "hf" else "", section.task, True)
    if prefix == "hf":
        module, architecture, origin = _load_transformers(section, rest, sentence)
    else:
        module, architecture, origin = {"timm": _load_timm, "py": _load_python}[prefix](section, rest)
    module = checked(module, section.source)
    if section.weights not in ("pretrained", "random"):
        _load_checkpoint(module, Path(section.weights))
    _refuse_bad_weights(module, section.source)
    _prepare(module)
    architecture |= {"task": section.task, "pooling": section.pooling, "normalize": bool(section.normalize)}
    labels = getattr(getattr(module, "config", None), "label2id", None) or {}
    if is_contrastive(module):
        module, architecture["tower"], labels = take_tower(module, section, lambda: load_tokenizer(section, origin))
    elif section.task == "zero-shot-image-classification" or (
        section.task == "image-feature-extraction" and prefix == "hf"
    ):
        raise InputError(
            f"a {type(module).__name__} cannot be used for {section.task}",
            "only CLIP and SigLIP are known to give such an output",
            "use one of these; for embeddings also timm models with model.args: {num_classes: 0}",
        )
    if sentence is not None:
        model, told = wrap_sentence(module, architecture, section, sentence, origin, _load_checkpoint)
        _refuse_bad_weights(model, section.source)
        warnings += told
    else:
        model = wrap(module, section.task, section.pooling, bool(section.normalize))
    return LoadedModel(model, architecture, origin, dict(labels), sentence, tuple(warnings))


def build(architecture: dict[str, Any], trust_python: bool = False) -> TaskModel:
    """The unpruned model of an `architecture` dictionary, with random weights.

    Raises InputError if the library has no such class, or if it names the user's own Python function and
    `trust_python` is off: opening a model folder must not run code that the folder names.
    """
    library = architecture.get("library")
    if library == "timm":
        import timm

        if not timm.is_model(architecture["name"]):  # neither a name of the hub nor a folder
            raise InputError(
                f"cannot rebuild a '{str(architecture['name'])[:60]}'",
                f"timm {timm.__version__} has no such model",
                "install the version of timm named in manifest.json",
            )
        module = _create_timm(architecture["name"], architecture["args"], pretrained=False)
    elif library == "transformers":
        import transformers

        model_class = getattr(transformers, architecture["class"], None)
        if not (isinstance(model_class, type) and issubclass(model_class, transformers.PreTrainedModel)):
            raise InputError(
                f"cannot rebuild a '{architecture['class']}'",
                f"transformers {transformers.__version__} has no such model class",
                "install the version of transformers named in manifest.json",
            )
        assert model_class.config_class is not None
        module = model_class(model_class.config_class.from_dict(plain_config(architecture["config"])))
    elif library == "python" and trust_python:
        module = call_python(architecture["source"], architecture["args"])
    else:
        raise InputError(
            "cannot rebuild this model",
            f"its architecture comes from {architecture.get('source', library)!r}, which is code outside this package",
            "pass trust_python=True if you trust that file",
        )
    _prepare(module)
    if "tower" in architecture:
        module = build_tower(module, architecture["tower"])
    sentence = architecture.get("sentence")
    return wrap(module, architecture["task"], architecture["pooling"], architecture["normalize"], sentence)


def _load_transformers(
    section: ModelSection, name: str, sentence: SentenceFolder | None = None
) -> tuple[nn.Module, dict[str, Any], str | None]:
    import transformers

    options: dict[str, Any] = {"trust_remote_code": section.trust_remote_code}
    arguments = {**({} if sentence is None else sentence.config_args), **section.args}
    if sentence is not None and sentence.subfolder:
        options["subfolder"] = sentence.subfolder
    by_type = name.removeprefix(_BY_TYPE) if name.startswith(_BY_TYPE) else None
    if by_type is not None and section.weights == "pretrained":
        raise InputError(
            f"'hf:{name}' has no weights of its own",
            "it names an architecture, not a checkpoint",
            "set model.weights to random or to a checkpoint, or name a model of the hub",
        )
    try:
        if by_type is not None:
            config = _config_of_type(by_type, section.args)
        else:
            config = transformers.AutoConfig.from_pretrained(name, **options, **arguments)
        refuse_quantised_config(config, section.source)
        config._attn_implementation = "eager"
        options["dtype"] = torch.float32  # whatever the checkpoint is stored in
        encoder = encoder_class(config) if section.task == "feature-extraction" else None
        auto = getattr(transformers, encoder or _AUTO_CLASS[section.task])
        if section.task == "image-segmentation" and type(config) not in auto._model_mapping:
            auto = transformers.AutoModelForUniversalSegmentation
        if section.weights == "pretrained":
            module, info = auto.from_pretrained(name, config=config, output_loading_info=True, **options)
        elif encoder is not None:
            module, info = auto(config), {}
        else:
            module, info = (
                auto.from_config(config, trust_remote_code=section.trust_remote_code, dtype=torch.float32),
                {},
            )
    except InputError:
        raise
    except Exception as error:  # transformers raises many types here; all of them mean the source cannot be used
        raise InputError(
            f"cannot load the model 'hf:{name}' for {section.task}",
            _first_line(error),
            "check the name or folder; a hub model needs network access once, a folder needs config.json and weights",
        ) from error
    # The pooler is not part of a sentence embedding, nor the loss of a segmentation; they are dropped with it.
    missing = sorted(key for key in info.get("missing_keys", ()) if not key.startswith(("pooler.", "criterion.")))
    if missing:
        raise InputError(
            f"'hf:{name}' has no weights for {section.task}",
            f"{len(missing)} are missing, such as {missing[0]}: they would stay random",
            "name a model trained for this task, or correct model.task",
        )
    architecture = {
        "library": "transformers",
        "class": type(module).__name__,
        "config": json.loads(module.config.to_json_string(use_diff=False)),
    }
    architecture["config"].pop("_name_or_path", None)
    return module, architecture, None if by_type is not None else name


def _config_of_type(name: str, fields: Mapping[str, Any]) -> Any:
    """The configuration of an architecture by its `model_type`, with these fields; nothing is downloaded."""
    import transformers

    known = sorted(transformers.CONFIG_MAPPING.keys())
    if name not in known:
        near = difflib.get_close_matches(name, known, n=3)
        hint = f": {', '.join(near)}" if near else ""
        raise InputError(
            f"cannot create the model 'hf:{_BY_TYPE}{name}'",
            f"transformers {transformers.__version__} knows no such model_type",
            f"use one of its types{hint}",
        )
    # A configuration takes whatever it is given: a field that a fresh one does not have is a slip.
    fresh = transformers.AutoConfig.for_model(name)
    unknown = next((field for field in fields if not hasattr(fresh, field)), None)
    if unknown is not None:
        names = [field for field in fresh.to_dict() if not field.startswith("_")]
        near = difflib.get_close_matches(unknown, names, n=3) or names[:5]
        raise InputError(
            f"model.args.{unknown} is no field of '{name}'",
            f"{type(fresh).__name__} does not have it",
            f"use one of its fields, such as {', '.join(near)}",
        )
    return transformers.AutoConfig.for_model(name, **fields)


def _load_timm(section: ModelSection, name: str) -> tuple[nn.Module, dict[str, Any], None]:
    pretrained, args = section.weights == "pretrained", dict(section.args)
    if not Path(name).is_absolute():
        return _create_timm(name, args, pretrained), {"library": "timm", "name": name, "args": args}, None
    module = _create_timm(f"local-dir:{name}", args, pretrained)
    config = _read_config(Path(name))
    args = {**config.get("model_args", {}), **args}  # what the folder says of itself is needed to build it elsewhere
    return module, {"library": "timm", "name": config["architecture"], "args": args}, None


def _create_timm(name: str, args: dict[str, Any], pretrained: bool) -> nn.Module:
    import timm

    taken = next((key for key in args if key in READS_FILES), None)
    if taken is not None:
        raise InputError(
            f"cannot create the model 'timm:{name}'",
            f"timm would read files by model.args.{taken}",
            "set model.weights to a checkpoint, or model.source to a folder",
        )
    try:
        return timm.create_model(name, pretrained=pretrained, **args)
    except Exception as error:  # unknown names, wrong arguments and download failures come as many types
        near = difflib.get_close_matches(name.partition(".")[0], timm.list_models(), n=3)
        hint = f"; similar names: {', '.join(near)}" if near else ""
        raise InputError(
            f"cannot create the model 'timm:{name}'", _first_line(error), f"check model.args and the name{hint}"
        ) from error


def _load_python(section: ModelSection, reference: str) -> tuple[nn.Module, dict[str, Any], None]:
    source = f"py:{reference}"
    module = call_python(source, section.args)
    if not isinstance(module, nn.Module):
        raise InputError(
            f"'{source}' is not a model", f"it returned a {type(module).__name__}", "return a torch.nn.Module"
        )
    return module, {"library": "python", "source": source, "args": section.args}, None


def call_python(source: str, args: Mapping[str, Any], *first: Any) -> Any:
    """Result of the user's function `py:/path/file.py:name` or `py:package.module:name`; InputError where it fails."""
    function = python_function(source)
    try:
        return function(*first, **args)
    except (Exception, SystemExit) as error:  # the user's own code may raise anything
        raise InputError(f"'{source}' failed", _first_line(error), "correct that function") from error


def python_function(source: str) -> Callable[..., Any]:
    """The function that `py:FILE.py:NAME` names; raises InputError where it cannot be loaded or is none."""
    where, _, name = source.removeprefix("py:").rpartition(":")
    try:
        if where.endswith(".py"):
            spec = importlib.util.spec_from_file_location(Path(where).stem, where)
            assert spec is not None and spec.loader is not None
            module = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(module)
        else:
            module = importlib.import_module(where)
        function = getattr(module, name)
    except (Exception, SystemExit) as error:  # importing the user's file may raise anything
        raise InputError(
            f"cannot load '{source}'", _first_line(error), "check the file, its imports and the name"
        ) from error
    if not callable(function):
        raise InputError(
            f"'{source}' is not a function", f"a {type(function).__name__} is not callable", "name a function"
        )
    return function


def _load_checkpoint(module: nn.Module, path: Path) -> None:
    """Load weights from safetensors, or from a pickle read with `weights_only=True` (no code can run)."""
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            state: Any = load_file(path)
        else:
            refuse_packed(path)
            state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # truncated files and disguised pickles raise many types
        raise InputError(
            f"cannot read the checkpoint {path}", _first_line(error), "give a .safetensors file or a plain state dict"
        ) from error
    for key in ("state_dict", "model"):
        state = state.get(key, state) if isinstance(state, dict) else state
    if not isinstance(state, dict) or not all(
        isinstance(key, str) and isinstance(value, torch.Tensor) for key, value in state.items()
    ):
        raise InputError(f"cannot use the checkpoint {path}", "it holds no state dict", "save model.state_dict()")
    # Of DataParallel and torch.compile.
    state = {key.removeprefix("module.").removeprefix("_orig_mod."): value for key, value in state.items()}
    try:
        module.load_state_dict(state)
    except RuntimeError as error:
        raise InputError(
            f"the checkpoint {path} does not fit the model", str(error)[:300], "check model.args against the checkpoint"
        ) from error


def _refuse_bad_weights(module: nn.Module, source: str) -> None:
    bad = next((name for name, value in module.state_dict().items() if not torch.isfinite(value).all()), None)
    if bad is not None:
        raise InputError(f"the weights of {source} are unusable", f"{bad} holds NaN or infinity", "repair the weights")


def _kind_of_folder(folder: Path) -> str:
    config = _read_config(transformer_folder(folder))
    kind = next((kind for key, kind in (("model_type", "hf"), ("architecture", "timm")) if key in config), None)
    if kind is None:
        raise InputError(
            f"cannot load a model from {folder}",
            "its config.json has neither 'model_type' (transformers) nor 'architecture' (timm)",
            "give a folder written by save_pretrained or by timm",
        )
    return kind


def _read_config(folder: Path) -> dict[str, Any]:
    if (folder / "adapter_config.json").is_file() and not (folder / "config.json").is_file():
        raise InputError(
            f"cannot load a model from {folder}",
            "it holds a PEFT adapter, not a model",
            "save model.merge_and_unload() and use that",
        )
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        if not isinstance(config, dict):
            raise ValueError("it is not a JSON object")
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(
            f"cannot load a model from {folder}", f"no readable config.json there ({error})", "give a model folder"
        ) from None
    return config


def _prepare(module: nn.Module) -> None:
    """What makes a module readable for the rest, done to loaded ones and to those built again: the names are equal."""
    readable(module)
    _use_eager_attention(module)
    use_equivalents(module)


def _use_eager_attention(module: nn.Module) -> None:
    """Plain matmul-softmax-matmul: masks and hooks see it, MACs are counted, and engines fuse it better than sdpa."""
    if isinstance(module, _HasAttention):
        module.set_attn_implementation("eager")
    for part in module.modules():
        if "fused_attn" in vars(part):  # timm: a plain attribute of each attention
            vars(part)["fused_attn"] = False


def _first_line(error: BaseException) -> str:
    text = str(error).strip()
    return f"{type(error).__name__}: {text.splitlines()[0] if text else ''}"
