"""Warnings about texts that are longer than the shipped sequence length."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from optin_export.data.batches import Processor, TextProcessor
from optin_export.data.readers import Examples


def length_warnings(processor: Processor, examples: Mapping[str, Sequence[Examples]]) -> list[str]:
    """One line for each kind of rows that `processor` cuts, and if the model's limit is below `export.sequence`.

    examples: 'calibration' or 'evaluation' -> its rows, on each side of pairs that are embedded apart.
    """
    if type(processor) is not TextProcessor:  # questions, words and masked tokens are cut in other ways
        return []
    found, most, sequence = [], processor.whole, processor.sequence
    if most is not None and most < sequence:
        found.append(
            f"the model cuts texts at {most} tokens, as sentence-transformers does, so no row fills export.sequence "
            f"({sequence}): latency is measured with padding; set export.sequence: {most}"
        )
    for name, rows in examples.items():
        longer = [length > sequence for side in rows for length in processor.lengths(side)]
        if any(longer):
            share = 100 * sum(longer) / len(longer)
            kept = "" if most is None else f"; sentence-transformers would keep {most}"
            longer_than = f"longer than export.sequence ({sequence} tokens)"
            found.append(f"{share:.3g} % of the {name} texts are {longer_than} and are cut{kept}")
    return found
