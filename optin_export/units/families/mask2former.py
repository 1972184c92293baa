"""Mask2Former of transformers on a Swin backbone: heads and neurons of the backbone and of the pixel decoder's
deformable attention, neurons of the transformer decoder.

The decoder's own heads stay: its cross attention is one torch function, its self-attention takes its width from its
input.
"""

from __future__ import annotations

from typing import Any

from optin_export.errors import InputError
from optin_export.units.declare import Family, UnitGroup, class_named
from optin_export.units.families.swin_transformers import groups_of_layer
from optin_export.units.inside import Inside


def _chain(model: Any, path: str) -> tuple[list[str], list[UnitGroup]]:
    """Blocks: the layers of the backbone, those of the pixel decoder, and the transformer decoder as a whole."""
    backbone, pixels = _backbone(model, path), _pixel_layers(model, path)
    decoder = f"{path}.transformer_module.decoder"
    groups = [group for index, (name, block) in enumerate(backbone) for group in groups_of_layer(block, name, index)]
    for index, (name, block) in enumerate(pixels, len(backbone)):
        groups += _pixel_groups(block, name, index)
    last = len(backbone) + len(pixels)
    for number, layer in enumerate(model.transformer_module.decoder.layers):
        groups.append(_decoder_neurons(layer, f"{decoder}.layers.{number}", last, number))
    return [*(name for name, _ in (*backbone, *pixels)), decoder], groups


def _backbone(model: Any, path: str) -> list[tuple[str, Any]]:
    encoder = model.pixel_level_module.encoder
    named = encoder.named_modules(prefix=f"{path}.pixel_level_module.encoder")
    layers = [(name, module) for name, module in named if type(module).__name__ == "SwinLayer"]
    if not layers:
        raise InputError(
            f"'{path}' has a backbone that the family mask2former cannot prune",
            f"{type(encoder).__name__} is not Swin",
            "use a Mask2Former with a Swin backbone",
        )
    return layers


def _pixel_layers(model: Any, path: str) -> list[tuple[str, Any]]:
    where = f"{path}.pixel_level_module.decoder.encoder.layers"
    return [(f"{where}.{i}", layer) for i, layer in enumerate(model.pixel_level_module.decoder.encoder.layers)]


def _pixel_groups(layer: Any, path: str, index: int) -> tuple[UnitGroup, ...]:
    attention, inside = layer.self_attn, Inside(layer, path, index)
    heads = inside.heads(
        [f"self_attn.{name}" for name in ("sampling_offsets", "attention_weights", "value_proj")],
        "self_attn.output_proj",
        attention.n_heads,
        residual=("", 0),
        sizes=[("self_attn.n_heads", 1), ("self_attn.d_model", attention.d_model // attention.n_heads)],
        sublayer="self_attn",
        returns_tuple=True,
        pairwise=False,
    )
    neurons = inside.neurons(["fc1"], "fc2", residual=("fc1", 0), sublayer="fc2", bypass=[("fc1", False)])
    return heads, neurons


def _decoder_neurons(layer: Any, path: str, index: int, number: int) -> UnitGroup:
    return Inside(layer, path, index).neurons(
        ["fc1"],
        "fc2",
        part=str(number),
        residual=("final_layer_norm" if layer.pre_norm else "fc1", 0),
        sublayer="fc2",
        bypass=[("fc1", False)],
        batch_dim=1,
    )


FAMILY = Family(
    name="mask2former",
    library="transformers",
    examples="facebook/mask2former-swin-*",
    units=("heads", "neurons"),
    sublayers=("heads", "neurons"),
    is_block=class_named("Mask2FormerModel"),
    chain=_chain,
)
