"""Load models from the hub or a folder (`hf:`), timm (`timm:`), or the user's own function (`py:`)."""

from __future__ import annotations

import difflib
import importlib
import importlib.util
import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from torch import nn

from optin_export.errors import InputError
from optin_export.models.adapt import checked, readable, refuse_other_task, refuse_quantised_config
from optin_export.models.backbones import drop_pooler, embedding_layout
from optin_export.models.by_type import BY_TYPE, auto_class, config_of_type
from optin_export.models.checkpoints import load_checkpoint
from optin_export.models.class_names import repaired_config
from optin_export.models.contrastive import build_tower, is_contrastive, take_tower
from optin_export.models.encoders import encoder_of, has_decoder, note_on
from optin_export.models.equivalents import use_equivalents
from optin_export.models.guard import READS_FILES, plain_config, refuse_endless, refuse_no_files
from optin_export.models.loading_report import missing_weights, unused_weights
from optin_export.models.lookup import Lookup, built, built_timm, from_pretrained
from optin_export.models.normalizations import plain_batch_norms
from optin_export.models.parametrizations import fold_weights
from optin_export.models.sentence import encoder_class
from optin_export.models.sentence_model import wrap_sentence
from optin_export.models.tasks import TaskModel, wrap
from optin_export.models.tokenizer import load_tokenizer
from optin_export.recipe import ModelSection
from optin_export.sentence import SentenceFolder, find_sentence_folder, transformer_folder
from optin_export.workdir.files import MAX_TEXT, read_json


@runtime_checkable
class _HasAttention(Protocol):
    """transformers models: the attention implementation can be chosen."""

    def set_attn_implementation(self, name: str) -> None: ...


@dataclass(frozen=True)
class LoadedModel:
    """A model with all that is needed to build it again without its weights.

    architecture: JSON-serialisable; `build(architecture)` gives the same modules with random weights.
    origin: folder or hub name of tokenizer and preprocessing, if any. labels: the recipe's class names with their index
    (zero-shot); `class_names` finds a model's own class names.
    notes: notes for the user, such as ignored entries of a checkpoint, one line each. looked_up: whether the values of
    the weights are missing. sentence: the sentence-transformers modules around the model, if it is such a folder.
    """

    model: TaskModel
    architecture: dict[str, Any]
    origin: str | None = None
    labels: dict[str, int] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    looked_up: bool = False
    sentence: SentenceFolder | None = None


def load_model(section: ModelSection, seed: int = 0, lookup: Lookup | None = None) -> LoadedModel:
    """Load the model of a recipe in float32 on the CPU, in eval mode and with eager attention.

    lookup: only look the model up: the same modules without the values of their weights, and the same errors.
    Raises InputError for a missing or unreadable model, an unknown architecture, or weights that do not fit.
    """
    if section.source.startswith("/"):  # a bare path, made absolute by the recipe
        prefix, rest = _kind_of_folder(Path(section.source)), section.source
    else:
        prefix, _, rest = section.source.partition(":")
    for place in ("" if prefix == "py" else rest, section.tokenizer or ""):
        if place.startswith("/"):
            refuse_no_files(Path(place))
    torch.manual_seed(seed)  # for weights: random
    sentence, notes = find_sentence_folder(rest if prefix == "hf" else "", section.task, lookup is None)
    if prefix == "hf":
        module, architecture, origin, further = _load_transformers(section, rest, lookup, sentence)
    else:
        module, architecture, origin, further = {"timm": _load_timm, "py": _load_python}[prefix](section, rest, lookup)
    return as_loaded(module, architecture, section, origin, [*notes, *further], sentence, looked_up=lookup is not None)


def as_loaded(
    module: nn.Module,
    architecture: dict[str, Any],
    section: ModelSection,
    origin: str | None = None,
    notes: Iterable[str] = (),
    sentence: SentenceFolder | None = None,
    looked_up: bool = False,
) -> LoadedModel:
    """Make a recipe's task module of a library's module, which is changed in place; see `LoadedModel`.

    Raises InputError for missing, quantised or non-finite weights, and for a module of another task.
    """
    notes = list(notes)
    module = checked(module, section.source)
    if section.weights not in ("pretrained", "random"):
        notes += load_checkpoint(module, section.weights, looked_up)
    if not looked_up:
        _refuse_bad_weights(module, section.source)
    _prepare(module)
    architecture |= {"task": section.task, "pooling": section.pooling, "normalize": bool(section.normalize)}
    labels: dict[str, int] = {}
    if is_contrastive(module):
        module, architecture["tower"], labels = take_tower(
            module, section, lambda: load_tokenizer(section, origin), classify=not looked_up
        )
    elif section.task == "image-feature-extraction" and architecture["library"] == "transformers":
        architecture["layout"] = embedding_layout(module)
    else:
        refuse_other_task(module, section.task)
    if has_decoder(module, section.task):
        notes.append(note_on(module))
        module, architecture["encoder"] = encoder_of(module), True
    if sentence is not None:
        load = partial(_load_layer, notes=notes, looked_up=looked_up)
        wrapped, further = wrap_sentence(module, architecture, section, sentence, origin, load)
        if not looked_up:
            _refuse_bad_weights(wrapped, section.source)
        notes += further
    else:
        encoder = "encoder" in architecture
        layout = architecture.get("layout", "vector")
        wrapped = wrap(module, section.task, section.pooling, bool(section.normalize), None, encoder, layout)
    return LoadedModel(wrapped, architecture, origin, dict(labels), tuple(notes), looked_up, sentence)


def _load_layer(layer: nn.Module, path: Path, notes: list[str], looked_up: bool) -> None:
    notes += load_checkpoint(layer, str(path), looked_up)


def build_module(architecture: dict[str, Any], trust_python: bool = False) -> nn.Module:
    """The unpruned module of an `architecture` dictionary as its library builds it, with random weights.

    Raises InputError if the library has no such class, or if it names the user's own Python function and
    `trust_python` is off: opening a model folder must not run code that the folder names.
    """
    library = architecture.get("library")
    if library == "timm":
        import timm

        if not timm.is_model(architecture["name"]):  # neither a hub name nor a folder
            raise InputError(
                f"cannot rebuild a '{str(architecture['name'])[:60]}'",
                f"timm {timm.__version__} has no such model",
                "install the version of timm named in manifest.json",
            )
        return _create_timm(architecture["name"], architecture["args"], pretrained=False)
    if library == "transformers":
        import transformers

        model_class = getattr(transformers, architecture["class"], None)
        if not (isinstance(model_class, type) and issubclass(model_class, transformers.PreTrainedModel)):
            raise InputError(
                f"cannot rebuild a '{architecture['class']}'",
                f"transformers {transformers.__version__} has no such model class",
                "install the version of transformers named in manifest.json",
            )
        assert model_class.config_class is not None
        module: nn.Module = model_class(model_class.config_class.from_dict(plain_config(architecture["config"])))
    elif library == "python" and trust_python:
        module = call_python(architecture["source"], architecture["args"])
    else:
        raise InputError(
            "cannot rebuild this model",
            f"its architecture comes from {architecture.get('source', library)!r}, which is code outside this package",
            "pass trust_python=True if you trust that file",
        )
    return module


def build(architecture: dict[str, Any], trust_python: bool = False) -> TaskModel:
    """The unpruned task module of an `architecture` dictionary, with random weights; raises as `build_module` does."""
    module = build_module(architecture, trust_python)
    _prepare(module)
    if "tower" in architecture:
        module = build_tower(module, architecture["tower"])
    encoder = bool(architecture.get("encoder"))
    module = encoder_of(module) if encoder else module
    layout, sentence = architecture.get("layout", "vector"), architecture.get("sentence")
    if layout != "vector":
        drop_pooler(module)
    task, pooling, normalize = (architecture[name] for name in ("task", "pooling", "normalize"))
    return wrap(module, task, pooling, normalize, sentence, encoder, layout)


def _load_transformers(
    section: ModelSection, name: str, lookup: Lookup | None, sentence: SentenceFolder | None = None
) -> tuple[nn.Module, dict[str, Any], str | None, list[str]]:
    import transformers

    options: dict[str, Any] = {"trust_remote_code": section.trust_remote_code}
    arguments = {**({} if sentence is None else sentence.config_args), **section.args}
    if sentence is not None and sentence.subfolder:
        options["subfolder"] = sentence.subfolder
    by_type = name.removeprefix(BY_TYPE) if name.startswith(BY_TYPE) else None
    if by_type is not None and section.weights == "pretrained":
        raise InputError(
            f"'hf:{name}' has no weights",
            "it names an architecture, not a checkpoint",
            "set model.weights to random or to a checkpoint, or give a model of the hub",
        )
    try:
        if by_type is not None:
            config = config_of_type(by_type, section.args)
        else:
            where = {"subfolder": options["subfolder"]} if "subfolder" in options else {}
            raw, _ = transformers.PreTrainedConfig.get_config_dict(name, **where)
            named = {} if {"num_labels", "id2label"} & set(section.args) else repaired_config(raw)
            config = transformers.AutoConfig.from_pretrained(name, **options, **named, **arguments)
        refuse_quantised_config(config, section.source)
        refuse_endless(config.to_dict(), section.source)
        config._attn_implementation = "eager"
        options["dtype"] = torch.float32  # whatever the checkpoint is stored in
        encoder = encoder_class(config) if section.task == "feature-extraction" else None
        auto = getattr(transformers, encoder) if encoder else auto_class(config, section.task)
        if section.weights == "pretrained" and lookup is not None:
            module, info = from_pretrained(auto, name, config, lookup, **options)
        elif section.weights == "pretrained":
            module, info = auto.from_pretrained(name, config=config, output_loading_info=True, **options)
        elif encoder is not None:
            module, info = auto(config), {}
        else:
            plain = {"trust_remote_code": section.trust_remote_code, "dtype": torch.float32}
            module, info = built(lambda: auto.from_config(config, **plain), lookup), {}
    except InputError:
        raise
    except Exception as error:  # transformers raises many types here; all of them mean the source cannot be used
        raise InputError(
            f"cannot load the model 'hf:{name}' for {section.task}",
            _first_line(error),
            "check the name or folder; a hub model needs the network once, a folder needs config.json and weights",
        ) from error
    missing = missing_weights(info, module, section.task)
    if missing:
        raise InputError(
            f"'hf:{name}' has no weights for {section.task}",
            f"{len(missing)} are missing, such as {missing[0]}: they would stay random",
            "give a model trained for this task, or correct model.task",
        )
    if section.task == "image-feature-extraction" and any(
        key.startswith("pooler.") for key in info.get("missing_keys", ())
    ):
        drop_pooler(module)
    notes = unused_weights(info, module, name, section.task)
    return module, architecture_of(module), None if by_type is not None else name, notes


def architecture_of(module: Any) -> dict[str, Any]:
    """The description from which `build` rebuilds a transformers model: its configuration, completed by the library."""
    config = json.loads(module.config.to_json_string(use_diff=False))
    config.pop("_name_or_path", None)
    return {"library": "transformers", "class": type(module).__name__, "config": config}


def _load_timm(
    section: ModelSection, name: str, lookup: Lookup | None
) -> tuple[nn.Module, dict[str, Any], None, list[str]]:
    pretrained, args = section.weights == "pretrained", dict(section.args)
    if section.task == "image-feature-extraction":
        args.setdefault("num_classes", 0)
    if not Path(name).is_absolute():
        module = built_timm(name, lambda load: _create_timm(name, args, load), pretrained, lookup)
        return module, {"library": "timm", "name": name, "args": args}, None, []
    module = built(lambda: _create_timm(f"local-dir:{name}", args, pretrained), lookup)
    config = _read_config(Path(name))
    args = {**config.get("model_args", {}), **args}  # the folder's own description is needed to build it elsewhere
    return module, {"library": "timm", "name": config["architecture"], "args": args}, None, []


def _create_timm(name: str, args: dict[str, Any], pretrained: bool) -> nn.Module:
    import timm

    taken = next((key for key in args if key in READS_FILES), None)
    if taken is not None:
        raise InputError(
            f"cannot create the model 'timm:{name}'",
            f"timm would read files through model.args.{taken}",
            "set model.weights to a checkpoint, or model.source to a folder",
        )
    refuse_endless(args, f"timm:{name}")
    try:
        return timm.create_model(name, pretrained=pretrained, **args)
    except Exception as error:  # unknown names, wrong arguments and download failures come as many types
        near = difflib.get_close_matches(name.partition(".")[0], timm.list_models(), n=3)
        hint = f"; similar names: {', '.join(near)}" if near else ""
        raise InputError(
            f"cannot create the model 'timm:{name}'", _first_line(error), f"check model.args and the name{hint}"
        ) from error


def _load_python(
    section: ModelSection, reference: str, lookup: Lookup | None
) -> tuple[nn.Module, dict[str, Any], None, list[str]]:
    source = f"py:{reference}"
    module = built(lambda: call_python(source, section.args), lookup)
    if not isinstance(module, nn.Module):
        raise InputError(
            f"'{source}' is not a model", f"it returned a {type(module).__name__}", "return a torch.nn.Module"
        )
    return module, {"library": "python", "source": source, "args": section.args}, None, []


def call_python(source: str, args: Mapping[str, Any], *first: Any) -> Any:
    """Result of the user's function `py:/path/file.py:name` or `py:package.module:name`; InputError if it fails."""
    function = python_function(source)
    try:
        return function(*first, **args)
    except (Exception, SystemExit) as error:  # the user's own code may raise anything
        raise InputError(f"'{source}' failed", _first_line(error), "correct that function") from error


def python_function(source: str) -> Callable[..., Any]:
    """The function that `py:FILE.py:NAME` names; raises InputError if it cannot be loaded or is not a function."""
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
        config = read_json(folder / "config.json", MAX_TEXT)
        if not isinstance(config, dict):
            raise ValueError("it is not a JSON object")
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(
            f"cannot load a model from {folder}", f"no readable config.json there ({error})", "give a model folder"
        ) from None
    return config


def _prepare(module: nn.Module) -> None:
    """Adapt a loaded or rebuilt module to the rest of the package, so that both have the same names."""
    fold_weights(module)
    plain_batch_norms(module)
    readable(module)
    _use_eager_attention(module)
    use_equivalents(module)


def _use_eager_attention(module: nn.Module) -> None:
    """Use plain matmul-softmax-matmul: masks and hooks see it, its MACs count, and engines fuse it better than sdpa."""
    if isinstance(module, _HasAttention):
        module.set_attn_implementation("eager")
    for part in module.modules():
        if "fused_attn" in vars(part):  # timm: a plain attribute of each attention
            vars(part)["fused_attn"] = False


def _first_line(error: BaseException) -> str:
    text = str(error).strip()
    return f"{type(error).__name__}: {text.splitlines()[0] if text else ''}"
