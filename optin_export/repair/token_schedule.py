"""The token schedule: tokens merged per block as the recipe says, or as the search chooses, and the units' costs.

Merging steps are units of the search, like heads and neurons. The same losses measure the effect of merging r tokens in
one block. Fewer tokens make all later units cheaper, so a few totals are tried, each with the plan that spends the rest
of the budget on units, and the built and repaired models are compared by their output loss.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
import torch

from optin_export.data import Batch
from optin_export.errors import InputError
from optin_export.models import Inputs, TaskModel
from optin_export.objective import Observation, Reference, mean_output_loss, output_losses, samples_of
from optin_export.progress import advance, task
from optin_export.pruning.token_merging import count_tokens, insert_merging
from optin_export.recipe import TokensSection
from optin_export.search import Plan, allocate_merging, check_merging, kept_share, most, spread_merging
from optin_export.units import Costs, Structure, Tokens, find_tokens, measure_costs, replayed

#: Average shares of kept tokens that `tokens: {keep: auto}` tries differ by it; and the smallest one.
STEP, FEWEST = 0.05, 0.3
#: Plans that are built at most, units alone among them.
TRIALS = 6
#: Loss of the most that a block can merge, as a share of the largest one, up to which it costs nothing.
FREE = 1e-6
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
    macs: float,
    temperature: float,
    seed: int,
    unmerged: tuple[Plan, float] | None = None,
) -> tuple[Plan, list[tuple[float, float]]]:
    """The plan whose built model has the least output loss on `scoring`, among plans that merge more or fewer tokens.

    Units alone are tried, and tokens alone: as many of them as meet the budget without removing a unit. From there the
    search goes in steps, first to more tokens and fewer units, then the other way, while the loss falls; at last by
    half a step to both sides of the best.

    macs: the budget. plan_of: costs -> the units to keep within it (InputError if it cannot be met); built: plan -> the
    repaired model; unmerged: the plan that keeps all tokens, and its model's output loss, where they are known.
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
    free = free_blocks(curves)
    costs_of = partial(merged_costs, model, structure, tokens, one=one, costs=costs)

    def spread(share: float) -> tuple[int, ...]:
        return spread_merging(share, count, tokens.prefix, blocks, free)

    def schedule(share: float) -> tuple[int, ...]:
        """The better one of two ways to distribute that many merged tokens: losses of steps do not add up."""
        choices = [spread(share), *allocate_merging(curves, share, count, tokens.prefix)]
        models = (insert_merging(model, structure, tokens, choice) for choice in choices)
        return choices[int(np.argmin([mean_output_loss(one, references, temperature) for one in models]))]

    best: tuple[float, Plan] | None = None if unmerged is None else (unmerged[1], unmerged[0])
    tried = [] if unmerged is None else [(1.0, unmerged[1])]
    attempts = 0 if unmerged is None else 1

    def improves(share: float) -> bool:
        """Build the plan with this share of tokens; whether it is the best one so far."""
        nonlocal best, attempts
        attempts += 1
        try:
            merged = schedule(share) if share < 1 else ()
            plan = plan_of(costs_of(merged=merged) if merged else costs).model_copy(update={"merged": merged})
        except InputError:
            return False
        loss = mean_output_loss(built(plan), references, temperature)
        tried.append((kept_share(merged, count, blocks), loss))
        advance()
        if best is not None and loss >= best[0]:
            return False
        best = loss, plan
        return True

    with task(TRIALS - attempts):
        if unmerged is None:
            improves(1.0)
        enough = _enough(lambda share: costs_of(merged=spread(share)), macs)
        if enough is not None and enough < 1:
            improves(enough)
            for step in (STEP, -STEP):
                share = enough + step
                while attempts < TRIALS and FEWEST <= share < 1 - STEP / 2 and improves(share):
                    share += step
                if share != enough + step:
                    break  # the loss falls in this direction, so it rises in the other one
            middle = enough if best is None or not best[1].merged else kept_share(best[1].merged, count, blocks)
            for step in (STEP / 2, -STEP / 2):
                if attempts < TRIALS and FEWEST <= middle + step < 1 and improves(middle + step):
                    break
    if best is None:
        plan_of(costs)  # raises: no plan meets the budget
    assert best is not None
    return best[1], tried


def free_blocks(curves: Sequence[np.ndarray]) -> int:
    """How many of the last blocks merge tokens without a loss, since nothing reads these behind their attention."""
    largest, free = max((float(curve[-1, 1]) for curve in curves), default=0.0), 0
    for curve in reversed(curves):
        if float(curve[:, 1].max()) > FREE * largest:
            break
        free += 1
    return free if free < len(curves) else 0


def _enough(costs_at: Callable[[float], Costs], macs: float) -> float | None:
    """The largest share of kept tokens, to a hundredth, with which the budget keeps all units; where none does, the
    smallest one that can be merged. None: nothing can be merged."""

    def meets(hundredths: int) -> bool | None:
        try:
            found = costs_at(hundredths / 100)
        except InputError:  # the blocks cannot merge that many tokens
            return None
        return found.of("macs", {}) <= macs * found.whole("macs")

    low = next((share for share in range(round(FEWEST * 100), 100) if meets(share) is not None), None)
    if low is None:
        return None
    high = 100
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if meets(middle) else (low, middle)
    return low / 100


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
