"""Read the unit of a feature off its gradient, where it reaches one unit only.

If feature o reaches unit u alone, d(x . (c_u w))/do = c_u d(x . w)/do for any factors c per unit: the ratio of the two
gradients is the unit's factor. Two factors are the digits of the unit's number, a third one is random and confirms it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

#: Distance of a digit from a whole number, and of the confirming factor from its value, up to which they are read.
DIGIT, FACTOR = 0.05, 1e-3
#: Entries below this share of the largest gradient of their feature are not read: rounding.
SMALL = 1e-3


def codes(units: int, generator: torch.Generator) -> list[torch.Tensor]:
    """float [units] each: ones, both digits of the unit's number, and a random factor, between 1 and 2."""
    base, numbers = _base(units), torch.arange(units)
    digits = [1 + digit / base for digit in (numbers // base, numbers % base)]
    return [torch.ones(units), *digits, 1 + torch.rand(units, generator=generator)]


def units_of(gradients: Sequence[torch.Tensor], confirming: torch.Tensor) -> torch.Tensor | None:
    """int64 [features]: the unit that each feature reaches, -1 for none; None if one of them cannot be read.

    gradients: float [entries, features], one per code. confirming: the last code.
    """
    plain, units = gradients[0], len(confirming)
    sizes = plain.abs()
    read = sizes > SMALL * sizes.amax(0)
    ratios = [torch.where(read, one / plain, 1.0) for one in gradients[1:]]
    high, low = ((ratio - 1) * _base(units) for ratio in ratios[:2])
    found = (high.round() * _base(units) + low.round()).long()
    clear = ((high - high.round()).abs() < DIGIT) & ((low - low.round()).abs() < DIGIT)
    clear &= (found >= 0) & (found < units)
    factors = confirming.to(plain)[found.clamp(0, units - 1)]
    clear &= (ratios[2] - factors).abs() < FACTOR
    unit = torch.where(read, found, -1).amax(0)
    return unit if bool((~read | (clear & (found == unit))).all()) else None


def _base(units: int) -> int:
    return math.isqrt(units - 1) + 1
