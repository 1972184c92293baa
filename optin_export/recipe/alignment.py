"""The multiple in which units are kept: the user's, or what the targets' kernels want in the recipe's precision."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from optin_export.recipe.delivery import Target
from optin_export.recipe.precision import Precision

#: What kernels in fp32 and 16 bits want (TF32: 4, fp16 and bf16: 8 features), and int8 kernels of a CPU (VNNI: 4).
USUAL = 8
#: Input and output features per layer from which eight-bit kernels of GPUs need no padding: TensorRT pads int8 to 32
#: (its guide, "Optimizing for Tensor Cores"), cuBLAS wants 16 bytes (NVIDIA's guide to matrix products), fp8 likewise.
_TENSORRT_INT8, _SIXTEEN_BYTES = 32, 16


@dataclass(frozen=True)
class Alignment:
    """features: neurons, channels, and heads times their width, are kept in multiples of this number.

    fixed: the user set it; it then holds for every group of neurons and channels, and for no heads.
    reason: why, in words that complete "multiples of 32: ...".
    """

    features: int
    fixed: bool
    reason: str


def alignment_of(asked: int | Literal["auto"], precision: Precision, targets: Sequence[Target]) -> Alignment:
    """`prune.align` for the targets: the largest number that one of them wants in this precision."""
    if asked != "auto":
        return Alignment(asked, True, "prune.align of the recipe")
    wanted = {target.name: _wanted(target, precision) for target in targets}
    features = max(wanted.values())
    if features == USUAL:
        return Alignment(USUAL, False, f"enough for {precision} on {', '.join(wanted)}")
    names = ", ".join(name for name, number in wanted.items() if number == features)
    return Alignment(features, False, f"what {precision} kernels of {names} compute without padding")


def _wanted(target: Target, precision: Precision) -> int:
    if target.device != "cuda" or precision not in ("int8", "fp8"):
        return USUAL
    tensorrt = target.engine.startswith("tensorrt") or target.provider == "tensorrt"
    return _TENSORRT_INT8 if tensorrt and precision == "int8" else _SIXTEEN_BYTES
