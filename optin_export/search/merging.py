"""The number of tokens that each block merges: from a share to keep, or as given, checked against the limits."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from optin_export.errors import InputError
from optin_export.search.knapsack import Options, solve

#: Minimum number of tokens after every block.
LEAST = 2


def tokens_left(merged: Sequence[int], tokens: int, blocks: int) -> list[int]:
    """Tokens after the attention of each block, where `tokens` enter the first one."""
    left = []
    for block in range(blocks):
        tokens -= merged[block] if block < len(merged) else 0
        left.append(tokens)
    return left


def kept_share(merged: Sequence[int], tokens: int, blocks: int) -> float:
    """Average over blocks of the share of the unmerged model's tokens that are left after its attention."""
    return sum(tokens_left(merged, tokens, blocks)) / (blocks * tokens)


def most(tokens: int, prefix: int) -> int:
    """The most tokens that one block can merge: pairs of a bipartite split, and at least `LEAST` tokens stay."""
    return max(min((tokens - prefix) // 2, tokens - LEAST), 0)


def check_merging(merged: Sequence[int], tokens: int, prefix: int, blocks: int) -> None:
    """Raises InputError for a schedule of more blocks than there are, or with more merged than a block can."""
    if len(merged) > blocks:
        raise InputError(
            f"tokens.schedule has {len(merged)} entries", f"the model has {blocks} blocks", "give one number per block"
        )
    for block, count in enumerate(merged):
        if count > most(tokens, prefix):
            raise InputError(
                f"tokens.schedule merges {count} tokens in block {block}",
                f"{tokens} enter it, {prefix} of them are never merged; at most {most(tokens, prefix)} can be",
                "merge fewer tokens there or in the blocks before",
            )
        tokens -= count


def spread_merging(keep: float, tokens: int, prefix: int, blocks: int, free: int = 0) -> tuple[int, ...]:
    """The same number per block (as nearly as whole numbers allow) such that `kept_share` is at most `keep`.

    The fewest tokens that do it. free: as many of the last blocks merge all that they can. Raises InputError if not
    even merging the most does.
    """
    merged: tuple[int, ...] = (0,) * blocks
    for total in range(blocks * tokens):
        merged = _even(total, tokens, prefix, blocks - free)
        for _ in range(free):
            merged += (most(tokens - sum(merged), prefix),)
        if kept_share(merged, tokens, blocks) <= keep + 1e-9:
            return merged
    raise InputError(
        f"tokens.keep is {keep:g}",
        f"the maximum merging still leaves {kept_share(merged, tokens, blocks):.3f} on average",
        f"ask for at least {kept_share(merged, tokens, blocks):.3f}",
    )


def allocate_merging(curves: Sequence[np.ndarray], keep: float, tokens: int, prefix: int) -> list[tuple[int, ...]]:
    """The numbers per block with the least sum of losses such that `kept_share` is at most `keep`; [] if none is found.

    curves: per block [points, 2] with tokens merged (from 0 up) and output loss. A block merges at most
    half of what it could merge alone, so that later blocks can merge, too.
    """
    blocks = len(curves)
    counts = np.arange(most(tokens, prefix) // 2 + 1)
    options = []
    for block, curve in enumerate(curves):
        losses = np.interp(counts, curve[:, 0], np.maximum.accumulate(curve[:, 1]))
        # Tokens that are not merged cost: they pass this block's FFN and every later block.
        options.append(Options((counts[-1] - counts) * (blocks - block), -losses))
    unmerged = sum(int(option.costs.max()) for option in options)
    choice = solve(options, unmerged - int(np.ceil((1 - keep) * blocks * tokens - 1e-9)))
    if choice is None:
        return []
    merged: list[int] = []
    for chosen in choice.chosen:
        merged.append(min(int(counts[chosen]), most(tokens - sum(merged), prefix)))
    return [tuple(merged)] if kept_share(merged, tokens, blocks) <= keep + 1e-9 else []


def _even(total: int, tokens: int, prefix: int, blocks: int) -> tuple[int, ...]:
    merged: list[int] = []
    for block in range(blocks):
        wanted = total * (block + 1) // blocks - total * block // blocks
        merged.append(min(wanted, most(tokens - sum(merged), prefix)))
    return tuple(merged)
