"""Read the description of a sentence-transformers folder (or hub model): modules.json and the files that it names.

Uses neither torch nor sentence-transformers. The result is a list of steps from token states to one
embedding, in the order in which `SentenceTransformer.encode` takes them; `models.sentence` builds them into the graph.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from optin_export.errors import InputError
from optin_export.sentence.files import MODULES, SETTINGS, Files, name_of, transformer_folder, transformer_subfolder
from optin_export.sentence.modules import EMBEDDING, TOKENS, Step, activation_name, listed_modules, read_steps, refusal
from optin_export.sentence.transformer import read_transformer

__all__ = [
    "EMBEDDING",
    "MODULES",
    "TOKENS",
    "Files",
    "SentenceFolder",
    "Step",
    "find_sentence_folder",
    "model_type_of",
    "name_of",
    "transformer_folder",
    "transformer_subfolder",
]

SIMILARITIES = ("cosine", "dot", "euclidean", "manhattan")


@dataclass(frozen=True)
class SentenceFolder:
    """How a SentenceTransformer, or a CrossEncoder, makes its output.

    source: its name in error messages. subfolder: where the transformer is, "" for the top. steps: from token states
    to the embedding; empty for a CrossEncoder. weights: index of a step -> its weights file. max_length: maximum tokens
    of a text; None: the tokenizer's limit. lower: texts are lowercased. prompt: prefix of every text. prompts: names of
    the folder's other prompts. activation: a torch.nn class, for a CrossEncoder. listed: whether there is a
    modules.json.
    """

    source: str
    kind: str
    listed: bool
    subfolder: str = ""
    steps: tuple[Step, ...] = ()
    weights: Mapping[int, Path] = field(default_factory=dict)
    max_length: int | None = None
    lower: bool = False
    prompt: str = ""
    prompts: tuple[str, ...] = ()
    similarity: str = "cosine"
    activation: str | None = None
    config_args: Mapping[str, Any] = field(default_factory=dict)
    tokenizer_args: Mapping[str, Any] = field(default_factory=dict)

    @property
    def poolings(self) -> tuple[str, ...]:
        """The poolings of its single Pooling module, as named in `model.pooling`; empty if it has none or several."""
        found = [step for step in self.steps if step["module"] == "pooling"]
        return tuple(found[0]["modes"]) if len(found) == 1 else ()

    @property
    def normalizes(self) -> bool:
        """Whether the final embedding is L2-normalised."""
        kept = [step for step in self.steps if step["module"] != "truncate"]
        return bool(kept) and kept[-1]["module"] == "normalize" and kept[-1]["output"] == EMBEDDING

    def describe(self) -> str:
        """Its steps in one line: 'mean and max pooling, Dense 64 -> 16 (Tanh), Normalize'."""
        names = {"normalize": "Normalize", "layer_norm": "LayerNorm"}
        parts = []
        for step in self.steps:
            kind = step["module"]
            if kind == "pooling":
                parts.append(f"{' and '.join(step['modes'])} pooling")
            elif kind == "dense":
                parts.append(f"Dense {step['in']} -> {step['out']} ({step['activation']})")
            else:
                parts.append(names.get(kind) or f"the first {step['dimension']} numbers")
        return ", ".join(parts)


def model_type_of(source: str) -> str | None:
    """The model type that a folder with modules.json declares, such as 'SentenceTransformer'; None for other models.

    Nothing is downloaded. Raises InputError for a file that cannot be read.
    """
    files = Files(name_of(source) or "", False)
    if not files.name or files.find(MODULES) is None:
        return None
    return str(files.settings(SETTINGS).get("model_type", "SentenceTransformer"))


def find_sentence_folder(source: str, task: str, fetch: bool = False) -> tuple[SentenceFolder | None, list[str]]:
    """How sentence-transformers would run this model for the task; None if it does not apply.

    Also returns warnings. Raises InputError, with the module's name, for a module that the graph cannot reproduce.
    """
    name = name_of(source)
    if name is None or task not in ("feature-extraction", "text-classification"):
        return None, []
    files = Files(name, fetch)
    modules = files.read(MODULES)
    settings = files.settings(SETTINGS) if modules is not None else {}
    if MODULES in files.unknown:
        config = files.find("config.json")  # the hub cannot be reached, and the model is in the local cache
        return None, [] if config is None else [
            f"whether {source} has a {MODULES} is not known, because the hub cannot be reached; "
            "it is used as a plain transformers model"
        ]
    if modules is None:
        return (_plain_cross_encoder(files) if task == "text-classification" else None), []
    kind = settings.get("model_type", "SentenceTransformer")
    if task == "text-classification":
        return (_cross_encoder(files, listed_modules(files, modules), settings) if kind == "CrossEncoder" else None), []
    if kind != "SentenceTransformer":
        tasks = {"CrossEncoder": "text-classification", "SparseEncoder": "fill-mask"}
        raise InputError(
            f"{name} is a {kind}, not a SentenceTransformer",
            f"{SETTINGS} says so: its output is not a sentence embedding",
            f"set model.task: {tasks[kind]}" if kind in tasks else "use another model",
        )
    folder = _sentence_transformer(files, listed_modules(files, modules), settings)
    return folder, _notes_of(folder)


def _notes_of(folder: SentenceFolder) -> list[str]:
    """Warnings about a folder that is used without changes."""
    found = []
    if folder.prompts:
        names = ", ".join(repr(name) for name in folder.prompts)
        found.append(
            f"{folder.source} has prompts ({names}) that encode() does not add by default: if your queries or "
            "documents need one, add it to the data and to the requests of clients"
        )
    return found


def _prompts(files: Files, settings: Mapping[str, Any]) -> dict[str, Any]:
    """prompt: the prefix that encode() adds to every text; prompts: names of the prompts that it does not add."""
    known = {name: text for name, text in (settings.get("prompts") or {}).items() if text}
    default = settings.get("default_prompt_name")
    if default is not None and default not in {*(settings.get("prompts") or {}), "query", "document"}:
        raise InputError(
            f"cannot use {SETTINGS} of {files.name}",
            f"its default_prompt_name '{default}' is not one of its prompts",
            "correct that file",
        )
    if not all(isinstance(text, str) for text in known.values()):
        raise InputError(f"cannot use {SETTINGS} of {files.name}", "a prompt is not text", "correct that file")
    return {"prompt": known.get(default, ""), "prompts": tuple(name for name in known if name != default)}


def _sentence_transformer(files: Files, listed: list[tuple[str, str]], settings: Mapping[str, Any]) -> SentenceFolder:
    made = read_transformer(files, listed, "feature-extraction")
    steps, weights = read_steps(files, listed[1:])
    dimension = settings.get("truncate_dim")
    if dimension is not None:
        steps.append({"module": "truncate", "input": EMBEDDING, "output": EMBEDDING, "dimension": int(dimension)})
    similarity = settings.get("similarity_fn_name") or "cosine"
    if similarity not in SIMILARITIES:
        raise InputError(
            f"the similarity {similarity} of {files.name} is not known",
            f"the known ones are {', '.join(SIMILARITIES)}",
            f"correct similarity_fn_name in {SETTINGS}",
        )
    return SentenceFolder(
        files.name,
        "SentenceTransformer",
        True,
        steps=tuple(steps),
        weights=weights,
        similarity=similarity,
        **made,
        **_prompts(files, settings),
    )


def _cross_encoder(files: Files, listed: list[tuple[str, str]], settings: Mapping[str, Any]) -> SentenceFolder:
    made = read_transformer(files, listed, "sequence-classification")
    if len(listed) > 1:
        raise refusal(files.name, listed[1][0], "the scores of a CrossEncoder must come from its Transformer alone")
    config = files.settings(f"{made['subfolder']}/config.json" if made["subfolder"] else "config.json")
    given = settings.get("activation_fn") or _activation_in(config)
    return SentenceFolder(
        files.name,
        "CrossEncoder",
        True,
        activation=_cross_activation(files, given, config),
        **made,
        **_prompts(files, settings),
    )


def _plain_cross_encoder(files: Files) -> SentenceFolder | None:
    """A CrossEncoder that was saved before modules.json existed, detected by its config.json. None for other models."""
    config = files.settings("config.json")
    if "sbert_ce_default_activation_function" not in config and not isinstance(
        config.get("sentence_transformers"), dict
    ):
        return None
    activation = _cross_activation(files, _activation_in(config), config)
    return SentenceFolder(files.name, "CrossEncoder", False, activation=activation)


def _activation_in(config: Mapping[str, Any]) -> Any:
    ours = config.get("sentence_transformers")
    if isinstance(ours, dict) and "activation_fn" in ours:
        return ours["activation_fn"]
    return config.get("sbert_ce_default_activation_function")


def _cross_activation(files: Files, given: Any, config: Mapping[str, Any]) -> str:
    """The torch.nn class that `CrossEncoder.predict` applies: the configured one, else a sigmoid for a single score."""
    if given is None:
        labels = config.get("num_labels", len(config.get("id2label") or (0, 1)))
        return "Sigmoid" if labels == 1 else "Identity"
    name = activation_name(given)
    if name is None:
        raise InputError(
            f"the activation {given} of {files.name} is not supported",
            "it is not an activation of torch.nn",
            "correct activation_fn in its configuration",
        )
    return name
