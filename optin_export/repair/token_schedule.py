"""The token schedule: tokens merged per block as the recipe says, or as the search chooses, and the units' costs.

Merging steps are units of the search, like heads and neurons. The same losses measure the effect of merging r tokens in
one block. Fewer tokens make all later units cheaper, so a few totals are tried, each with the plan that spends the rest
of the budget on units, and the built and repaired models are compared by their output loss.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np
import torch

from optin_export.data import Batch
from optin_export.errors import InputError
from optin_export.models import Inputs, TaskModel
from optin_export.objective import Observation, Reference, mean_output_loss, output_losses, samples_of
from optin_export.progress import track
from optin_export.pruning.token_merging import count_tokens, insert_merging
from optin_export.recipe import TokensSection
from optin_export.search import Plan, allocate_merging, check_merging, kept_share, most, spread_merging
from optin_export.units import Costs, Structure, Tokens, find_tokens, measure_costs, replayed

#: Average shares of kept tokens that `tokens: {keep: auto}` tries.
SHARES = (1.0, 0.9, 0.8, 0.7, 0.6, 0.5)
#: No fewer tokens are tried behind a loss that is above the smallest one by this factor: the loss has one minimum.
WORSE = 1.1
#: Numbers of merged tokens at which a block's loss is measured, as shares of the most that it can merge.
STEPS = (0.15, 0.3, 0.6)
#: These losses only distribute a number of merged tokens over the blocks: one in THINNED batches is measured.
THINNED = 4


def scheduled(
    model: TaskModel, structure: Structure, section: TokensSection, one: Inputs
) -> tuple[tuple[int, ...], Costs]:
    """Tokens merged per block as the recipe says (none yet for `auto`), and the units' costs then.

    one: a single sample at the shipped shape. Raises InputError if tokens cannot be merged, or not that many.
    """
    costs = measure_costs(model, structure, one)
    if not section.merges:
        return (), costs
    tokens, blocks = tokens_of(model, structure, one), len(structure.blocks)
    if section.keep == "auto":
        return (), costs
    count = count_tokens(model, structure, one)
    merged = section.schedule or spread_merging(float(section.keep), count, tokens.prefix, blocks)
    check_merging(merged, count, tokens.prefix, blocks)
    return merged, merged_costs(model, structure, tokens, merged, one, costs)


def merged_costs(
    model: TaskModel, structure: Structure, tokens: Tokens, merged: Sequence[int], one: Inputs, costs: Costs
) -> Costs:
    """The units' costs with merged tokens; shares are still relative to the unmerged model."""
    found = measure_costs(insert_merging(model, structure, tokens, merged), structure, one)
    return dataclasses.replace(found, unmerged=costs.macs)


def share_budget(
    model: TaskModel,
    structure: Structure,
    one: Inputs,
    costs: Costs,
    scoring: Sequence[Batch],
    plan_of: Callable[[Costs], Plan],
    built: Callable[[Plan], TaskModel],
    *,
    temperature: float,
    seed: int,
    unmerged: tuple[Plan, float] | None = None,
) -> tuple[Plan, list[tuple[float, float]]]:
    """The plan whose built model has the least output loss on `scoring`, among plans that merge ever more tokens.

    plan_of: costs -> the units to keep (InputError if the budget cannot be met); built: plan -> the repaired model;
    unmerged: the plan that keeps all tokens, and its model's output loss, where they are known.
    Returns the plan, and (share of tokens kept, output loss) of all models that were built.
    """
    tokens, blocks = tokens_of(model, structure, one), len(structure.blocks)
    count = count_tokens(model, structure, one)
    references = Reference(model, structure, scoring, draw=torch.Generator().manual_seed(seed), keep="output")
    references.observe()
    few = Reference(model, structure, scoring[::THINNED], draw=torch.Generator().manual_seed(seed))
    try:
        curves = merging_curves(model, few.structure, tokens, count, few, temperature)
    finally:
        few.close()
    best = None if unmerged is None else (unmerged[1], unmerged[0])
    tried = [] if unmerged is None else [(1.0, unmerged[1])]
    for share in track(SHARES if unmerged is None else SHARES[1:]):
        merged: tuple[int, ...] = ()
        if share < 1:
            choices = [spread_merging(share, count, tokens.prefix, blocks)]
            choices += allocate_merging(curves, share, count, tokens.prefix)
            # Losses of steps do not add up, so both ways of distributing them are measured.
            merged = min(
                choices,
                key=lambda one: mean_output_loss(
                    insert_merging(model, structure, tokens, one), references, temperature
                ),
            )
        try:
            plan = plan_of(merged_costs(model, structure, tokens, merged, one, costs) if merged else costs)
        except InputError:
            if share == SHARES[-1] and best is None:
                raise
            continue
        plan = plan.model_copy(update={"merged": merged})
        loss = mean_output_loss(built(plan), references, temperature)
        tried.append((kept_share(merged, count, blocks), loss))
        if best is None or loss < best[0]:
            best = loss, plan
        elif loss > WORSE * best[0]:
            break
    assert best is not None
    return best[1], tried


def merging_curves(
    model: TaskModel,
    structure: Structure,
    tokens: Tokens,
    count: int,
    references: Sequence[Observation],
    temperature: float,
) -> list[np.ndarray]:
    """Per block, float64 [points, 2]: tokens merged there and nowhere else, mean output loss.

    references: with block outputs, from which the blocks before are replayed.
    """
    limit = most(count, tokens.prefix)
    steps = sorted({max(1, round(share * limit)) for share in STEPS}) if limit else []
    curves = []
    for block in range(len(structure.blocks)):
        points = [(0.0, 0.0)]
        for step in steps:
            merged = insert_merging(model, structure, tokens, [*[0] * block, step])
            total = 0.0
            for reference in references:
                before = {path: reference.hidden[path] for path in structure.blocks[:block]}
                with torch.no_grad(), replayed(merged, before, structure.rewritten):
                    result = merged(**reference.inputs)
                total += float(output_losses(merged, reference, result, temperature).sum())
            points.append((float(step), total / samples_of(references)))
        curves.append(np.array(points))
    return curves


def tokens_of(model: TaskModel, structure: Structure, one: Inputs) -> Tokens:
    """How the model's tokens can be merged.

    one: a single sample at the shipped shape. Raises InputError if they cannot, if the model's output needs them all,
    or if its own code does not run with fewer tokens.
    """
    if model.output_layout != "vector":
        raise _unmergeable("its output has a row per token or pixel")
    tokens = find_tokens(model)
    kinds = sorted(set(structure.families))
    if len(kinds) > 1:
        raise _unmergeable(f"its units are in blocks of several families ({', '.join(kinds)})")
    with torch.no_grad():
        whole = model(**one)
        try:
            few = insert_merging(model, structure, tokens, [1])(**one)
        except Exception as error:  # the model's own code, between its blocks and behind them, may raise anything
            why = next(iter(str(error).strip().splitlines()), type(error).__name__)[:200]
            raise _unmergeable(f"its code needs all of them: {why}") from None
    if few.shape != whole.shape:
        raise _unmergeable("its output is another one with fewer tokens")
    return tokens


def _unmergeable(why: str) -> InputError:
    return InputError("the model's tokens cannot be merged", why, "set tokens.keep: 1.0")
