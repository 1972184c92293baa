"""Names and units for people of what stages record under short keys."""

from __future__ import annotations

from typing import Any

#: Key -> (name, what it means).
PLAIN = {
    "lambda": ("weight of the output loss", "against the loss of the blocks' outputs, so that both count alike"),
    "probes": ("random backward passes", "from which the scores are estimated"),
    "rank_correlation": ("rank correlation with converged scores", "1: more passes would not change the order"),
    "cut_agreement": (
        "kept units on which two halves agree",
        "share of units that stay by both halves of the passes",
    ),
    "masked_exactly": ("units tested one by one", "those whose estimate is the least sure"),
    "bfloat16_agreement": (
        "rank correlation between bfloat16 and float32",
        "of gradients on a few rows; scores are computed in bfloat16 from 0.99 on, below it in float32",
    ),
    "without_effect": ("units without effect", "removing them changes nothing"),
    "bytes": ("file size", ""),
    "build_seconds": ("time to build", ""),
    "memory_gib": ("memory", ""),
    "cpu": ("processor", ""),
    "cpus": ("processor cores", ""),
    "network_layers": ("layers as parsed", ""),
    "layers": ("layers as built", ""),
    "fused_attention": ("attentions in one kernel", ""),
    "compute_capabilities": ("GPU generations (compute capability)", ""),
    "kernel_precision": ("precision of the kernels", ""),
    "optin_export": ("optin_export", ""),
}


def plain(key: str) -> str:
    """'packages.torch' -> 'torch', 'rank_correlation' -> its plain name, other keys with spaces for underscores."""
    last = key.removeprefix("packages.")
    return PLAIN[last][0] if last in PLAIN else last.replace("_", " ")


def meaning(key: str) -> str:
    """What a value says; "" where its name does."""
    return PLAIN.get(key, ("", ""))[1]


def with_unit(key: str, value: Any, shown: str) -> str:
    """The value as `shown`, or with the unit that its key stands for."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return shown
    if key == "bytes":
        return f"{value / 2**20:.1f} MiB" if value >= 2**20 else f"{value / 2**10:.0f} KiB"
    if key == "memory_gib":
        return f"{value:.1f} GiB"
    if key in ("rank_correlation", "cut_agreement", "bfloat16_agreement"):
        return f"{value:.1%}" if key == "cut_agreement" else f"{value:.3f}"
    return f"{value:,.0f}" if isinstance(value, float) and value.is_integer() else shown
