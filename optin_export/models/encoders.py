"""Models of an encoder and a decoder: the encoder is the task's module, and the decoder stays whole."""

from __future__ import annotations

from typing import Any

from torch import nn

#: Tasks that need the encoder alone.
TASKS = ("feature-extraction", "automatic-speech-recognition")


def has_decoder(module: Any, task: str) -> bool:
    """Whether the task's module is the encoder of a transformers model that has a decoder as well."""
    return (
        task in TASKS
        and bool(getattr(getattr(module, "config", None), "is_encoder_decoder", False))
        and encoder_of(module) is not module
    )


def encoder_of(module: Any) -> nn.Module:
    """The encoder of a transformers model with a decoder."""
    encoder: nn.Module = module.get_encoder()
    return encoder


def note_on(module: nn.Module) -> str:
    """One line for the user about a model of which only the encoder is the task's module."""
    return (
        f"a {type(module).__name__} has an encoder and a decoder: the encoder is pruned and exported, its last hidden "
        "states are compared, and the decoder stays as it is"
    )
