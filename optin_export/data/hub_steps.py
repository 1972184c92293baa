"""Possible meanings of the fields of a transformers image processor, as steps of `pixels`; the likeliest first.

Processors share their fields but not what they do with them, so these are candidates: `hub_images` tries each.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from typing import Any

#: Pillow's numbers of resampling filters.
_FILTERS = {0: "nearest", 1: "lanczos", 2: "bilinear", 3: "bicubic", 4: "box", 5: "hamming"}
#: ConvNeXt crops images below this size, and only stretches larger ones.
_CONVNEXT_STRETCHES = 384


@dataclass(frozen=True)
class Candidate:
    """config: as in `pixels`, without `input_size`. normalises: whether it includes the processor's mean and std."""

    config: dict[str, Any]
    normalises: bool


def candidates(processor: Any, sizes: dict[str, dict[str, int]], channels: int, resampling: str) -> Iterator[Candidate]:
    """Every interpretation of the processor's fields, the simplest first.

    sizes: the set fields of its `size`, `crop_size` and `pad_size`. resampling: as in `pixels`.
    """
    cut, pads = sizes["crop_size"], sizes["pad_size"]
    crops = (
        [[{"crop": {"size": [cut["height"], cut["width"]]}}]]
        if _on(processor, "do_center_crop") and "height" in cut
        else []
    )
    ends = (
        [[{"pad": {"size": [pads["height"], pads["width"]]}}]] if _on(processor, "do_pad") and "height" in pads else []
    )
    ways = list(_resizes(processor, sizes)) if _on(processor, "do_resize") else [[]]
    # PP-LCNet reverses the channels after normalising, so its statistics are reversed too.
    late = getattr(processor, "resize_short", None) is not None
    flips = (True, False) if late or _on(processor, "do_flip_channel_order") else (False,)
    scalings = list(_scalings(processor, channels))
    for way, crop, end, flip, (scaling, normalises) in product(ways, [*crops, []], [*ends, []], flips, scalings):
        steps = [*way, *([] if any("crop_share" in one for one in way) else crop), *end]
        config = {"resampling": resampling, "steps": steps, "reverse_channels": flip, **scaling}
        if late and flip:
            config |= {name: scaling[name][::-1] for name in ("mean", "std")}
        yield Candidate(config, normalises)


def _on(processor: Any, name: str) -> bool:
    return bool(getattr(processor, name, False))


def _resizes(processor: Any, sizes: dict[str, dict[str, int]]) -> Iterator[list[dict[str, Any]]]:
    size, cut = sizes["size"], sizes["crop_size"]
    how = _FILTERS.get(int(getattr(processor, "resample", None) or 0), "bilinear")
    if getattr(processor, "resample", None) is None:
        how = "bilinear"
    divisor, multiple = getattr(processor, "size_divisor", None), getattr(processor, "ensure_multiple_of", None)
    share = getattr(processor, "crop_pct", None)
    edge, exact = size.get("shortest_edge"), [size[name] for name in ("height", "width") if name in size]

    def resize(**rule: Any) -> dict[str, Any]:
        return {"resize": {**rule, "filter": how}}

    rules: list[dict[str, Any]] = []
    if getattr(processor, "resize_short", None):
        rules.append({"rule": "shortest_rounded", "edge": int(processor.resize_short)})
    elif edge and "longest_edge" in size:
        rules.append({"rule": "shortest_longest", "edge": edge, "longest": size["longest_edge"]})
    elif edge:
        rules.append({"rule": "shortest", "edge": edge})
    elif "max_height" in size and "max_width" in size:
        rules.append({"rule": "fit", "size": [size["max_height"], size["max_width"]]})
    elif exact:
        rules.append({"rule": "exact", "size": exact})
        if multiple:
            keep = _on(processor, "keep_aspect_ratio")
            rules.insert(0, {"rule": "scale", "size": exact, "keep": keep, "of": multiple})
    if share and edge:  # ConvNeXt, then PoolFormer
        if edge < _CONVNEXT_STRETCHES:
            yield [resize(rule="shortest", edge=int(edge / share)), {"crop": {"size": [edge, edge]}}]
        else:
            yield [resize(rule="exact", size=[edge, edge])]
        yield [resize(rule="shortest", edge=int(edge / share))]
    elif share and exact:
        square = exact[0] == exact[1]
        larger = [int(side / share) for side in exact]
        yield [resize(rule="shortest", edge=larger[0]) if square else resize(rule="exact", size=larger)]
    if "height" in cut and exact:  # Perceiver crops first, to a share of the shorter side
        shares = [exact[0] / cut["height"], exact[1] / cut["width"]]
        perceiver = [{"crop_share": {"share": shares}}, resize(rule="exact", size=exact)]
        if "Perceiver" in type(processor).__name__:
            yield perceiver
    for rule in rules:
        if divisor:
            yield [resize(**rule, multiple=divisor)]
        yield [resize(**rule)]
    if edge:  # LeViT
        yield [resize(rule="shortest", edge=int((256 / 224) * edge))]


def _scalings(processor: Any, channels: int) -> Iterator[tuple[dict[str, Any], bool]]:
    """scale, offset, mean and std; and whether they include the processor's mean and std."""
    scale, offset = 1.0, 0.0
    if _on(processor, "do_rescale"):
        scale = float(getattr(processor, "rescale_factor", None) or 1 / 255)
        offset = -1.0 if _on(processor, "rescale_offset") else 0.0
    plain: dict[str, Any] = {"scale": scale, "offset": offset, "mean": [0.0] * channels, "std": [1.0] * channels}
    mean, std = (_per_channel(getattr(processor, f"image_{name}", None), channels) for name in ("mean", "std"))
    if mean is not None and std is not None:
        twice = [one * one for one in std]
        if _on(processor, "do_normalize"):
            if _on(processor, "include_top"):  # EfficientNet divides by the deviation once more
                yield {**plain, "mean": mean, "std": twice}, True
            yield {**plain, "mean": mean, "std": std}, True
        elif _on(processor, "include_top"):
            yield {**plain, "std": std}, True
    yield plain, False


def _per_channel(given: Any, channels: int) -> list[float] | None:
    if given is None:
        return None
    values = [float(given)] * channels if isinstance(given, float | int) else [float(one) for one in given]
    return values if len(values) == channels else None
