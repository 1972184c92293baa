"""sentence-transformers modules that follow the transformer, as layers of the graph, and their weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from optin_export.errors import InputError
from optin_export.models.pooling import MERGEABLE, Pooling
from optin_export.recipe import ModelSection
from optin_export.sentence import EMBEDDING, TOKENS, SentenceFolder, Step

#: model_type of encoder-decoder models of which sentence-transformers loads only the encoder.
_ENCODERS = {
    "t5": "T5EncoderModel",
    "mt5": "MT5EncoderModel",
    "umt5": "UMT5EncoderModel",
    "longt5": "LongT5EncoderModel",
    "switch_transformers": "SwitchTransformersEncoderModel",
    "prophetnet": "ProphetNetEncoder",
}


class Dense(nn.Module):
    """forward([..., in]) -> [..., out]: a linear layer, its activation, and optionally the input added to it."""

    def __init__(self, step: Mapping[str, Any]) -> None:
        super().__init__()
        self.linear = nn.Linear(step["in"], step["out"], bias=step["bias"])
        self.activation_function = make_activation(step["activation"])
        self.adds = bool(step["residual"])
        # The library's own name; with equal widths the input is added without a projection.
        self.residual = (
            nn.Linear(step["in"], step["out"], bias=False) if self.adds and step["in"] != step["out"] else None
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        result = self.activation_function(self.linear(x))
        if not self.adds:
            return result
        return result + (x if self.residual is None else self.residual(x))


class LayerNorm(nn.Module):
    def __init__(self, step: Mapping[str, Any]) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(step["dimension"])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(x)


class Normalize(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.normalize(x, dim=-1)


class Truncate(nn.Module):
    def __init__(self, dimension: int) -> None:
        super().__init__()
        self.dimension = dimension

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x[..., : self.dimension]


class SentenceHead(nn.Module):
    """The steps from token states to an embedding: forward(hidden [batch, tokens, features], counts [batch, tokens])
    -> [batch, dim].

    steps: dictionaries as in `optin_export.sentence`; each reads a named value and writes another.
    Raises InputError for an unknown step.
    """

    def __init__(self, steps: Sequence[Step]) -> None:
        super().__init__()
        self.steps = tuple(dict(step) for step in steps)
        self.layers = nn.ModuleList([_layer(step) for step in steps])

    def forward(self, hidden: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
        values = {TOKENS: hidden}
        for step, layer in zip(self.steps, self.layers, strict=True):
            given = values[step["input"]]
            values[step["output"]] = layer(given, counts) if isinstance(layer, Pooling) else layer(given)
        return values[EMBEDDING]

    @property
    def cannot_merge(self) -> str | None:
        """The reason why merging tokens would change the embedding; None if it does not."""
        for step in self.steps:
            if step["module"] == "pooling":
                other = next((mode for mode in step["modes"] if mode not in MERGEABLE), None)
                if other is not None:
                    return f"the pooling is {other}"
                if step.get("skip"):
                    return "the tokens of the prompt are left out of the pooling"
            elif step["input"] == TOKENS:
                return f"a {step['module']} module reads single tokens"
        return None


def _layer(step: Step) -> nn.Module:
    kind = step["module"]
    if kind == "pooling":
        return Pooling(step["modes"], int(step.get("skip", 0)))
    if kind == "dense":
        return Dense(step)
    if kind == "layer_norm":
        return LayerNorm(step)
    if kind == "normalize":
        return Normalize()
    if kind == "truncate":
        return Truncate(int(step["dimension"]))
    raise InputError(f"unknown step '{kind}'", "this version does not support it", "install the version that wrote it")


def make_activation(name: str) -> nn.Module:
    """The torch.nn activation of this name. Raises InputError for an unknown name, or one that needs arguments."""
    kind = getattr(nn, name, None)
    if isinstance(kind, type) and (kind is nn.Identity or kind.__module__ == "torch.nn.modules.activation"):
        try:
            return kind()
        except TypeError:
            pass
    raise InputError(
        f"the activation {name} is not supported",
        "it is not an activation of torch.nn",
        "use one such as Tanh or Identity",
    )


def plain_steps(pooling: str | None, normalize: bool) -> list[Step]:
    """The steps of a model without modules.json."""
    steps: list[Step] = [{"module": "pooling", "input": TOKENS, "output": EMBEDDING, "modes": [pooling or "mean"]}]
    return [*steps, _normalizing()] if normalize else steps


def _normalizing() -> Step:
    return {"module": "normalize", "input": EMBEDDING, "output": EMBEDDING}


def chosen_steps(folder: SentenceFolder, section: ModelSection) -> tuple[list[Step], list[int | None], list[str]]:
    """The folder's steps with the recipe's changes; the folder's index of each step; warnings.

    Raises InputError for a pooling that the folder's next module cannot take.
    """
    contradictions: list[str] = []
    steps: list[tuple[Step, int | None]] = [(dict(step), index) for index, step in enumerate(folder.steps)]
    if section.pooling is not None and folder.poolings != (section.pooling,):
        places = [at for at, (step, _) in enumerate(steps) if step["module"] == "pooling"]
        if len(places) != 1 or (len(folder.poolings) > 1 and any(step["module"] == "dense" for step, _ in steps)):
            found = " and ".join(folder.poolings) or "several"
            raise InputError(
                f"model.pooling is {section.pooling}, but {folder.source} has {found}",
                "its other modules were trained for that width",
                "leave model.pooling out",
            )
        steps[places[0]][0]["modes"] = [section.pooling]
        contradictions.append(_contradiction("pooling", section.pooling, " and ".join(folder.poolings), folder.source))
    if section.normalize is not None and section.normalize != folder.normalizes:
        last = max(at for at, (step, _) in enumerate(steps) if step["module"] != "truncate")
        if section.normalize:
            steps.insert(last + 1, (_normalizing(), None))
        else:
            del steps[last]
        given, found = (str(value).lower() for value in (section.normalize, folder.normalizes))
        contradictions.append(_contradiction("normalize", given, found, folder.source))
    return [step for step, _ in steps], [index for _, index in steps], contradictions


def _contradiction(field: str, given: str, found: str, source: str) -> str:
    return (
        f"model.{field} is {given}, but modules.json of {source} says {found}: the recipe is followed, "
        "so embeddings are not those of sentence-transformers"
    )


def load_head(
    head: SentenceHead, indices: Sequence[int | None], folder: SentenceFolder, load: Callable[[nn.Module, Path], None]
) -> None:
    """Fill the layers of `head` from the folder's files. load: (module, file of weights) -> None."""
    for layer, index in zip(head.layers, indices, strict=True):
        path = None if index is None else folder.weights.get(index)
        if path is not None:
            load(layer, path)


def encoder_class(config: Any) -> str | None:
    """transformers' encoder-only class, for a model with a decoder, which embeddings do not need."""
    return _ENCODERS.get(config.model_type)
