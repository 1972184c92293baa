"""Choose plans by building models: the smallest that keeps the accuracy, the best share of merged tokens."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from optin_export import measure, repair, search
from optin_export.data import Sources
from optin_export.errors import InputError
from optin_export.models import TaskModel, as_function
from optin_export.recipe import Budget
from optin_export.search import Plan
from optin_export.stages.results import SearchLog
from optin_export.units import Costs, Structure

#: (budget, costs) -> the plan; a plan -> its repaired model.
PlanOf = Callable[[Budget, Costs], Plan]
Built = Callable[[Plan], TaskModel]


def choose(
    sources: Sources,
    structure: Structure,
    costs: Costs,
    least: Mapping[str, int],
    plan_of: PlanOf,
    built: Built,
) -> tuple[Plan, SearchLog]:
    """The plan that a recipe asks for, and the models that were tried."""
    recipe = sources.recipe
    budget = recipe.budget
    if recipe.tokens.keep == "auto":
        return shared_with_tokens(sources, structure, costs, plan_of, built)
    if budget.accuracy_drop is None:
        return plan_of(budget, costs), SearchLog()
    found = _smallest(sources, costs, least, lambda budget: built(plan_of(budget, costs)), budget.accuracy_drop)
    return plan_of(Budget(macs=found.fraction), costs), SearchLog(tuple(found.tried))


def shared_with_tokens(
    sources: Sources,
    structure: Structure,
    costs: Costs,
    plan_of: PlanOf,
    built: Built,
    unmerged: tuple[Plan, float] | None = None,
) -> tuple[Plan, SearchLog]:
    """The plan that shares the recipe's budget between units and merged tokens with the least output loss.

    unmerged: the plan that keeps all tokens, and its model's output loss, where they are known.
    """
    recipe = sources.recipe
    plan, shares = repair.share_budget(
        sources.model,
        structure,
        sources.fixed(1),
        costs,
        sources.curves,
        lambda costs: plan_of(recipe.budget, costs),
        built,
        macs=recipe.budget.fraction,
        temperature=recipe.prune.temperature,
        seed=recipe.seed,
        unmerged=unmerged,
    )
    return plan, SearchLog(shares=tuple(shares))


def may_merge_if_needed(sources: Sources) -> bool:
    """Whether the search may merge tokens that the recipe does not mention: those of images, under a budget of MACs."""
    recipe = sources.recipe
    return (
        recipe.tokens.if_needed
        and not recipe.is_text
        and recipe.budget.macs is not None
        and recipe.model.family is None
    )


def can_merge_if_needed(sources: Sources, structure: Structure) -> bool:
    """Whether it may, and the model runs with merged tokens."""
    if not may_merge_if_needed(sources):
        return False
    try:
        repair.tokens_of(sources.model, structure, sources.fixed(1))
    except InputError:
        return False
    return True


def _smallest(
    sources: Sources,
    costs: Costs,
    least: Mapping[str, int],
    built: Callable[[Budget], TaskModel],
    limit: float,
) -> search.Bisection:
    """The smallest budget that keeps the accuracy on the evaluation rows reserved for the search."""
    data = sources.selection()
    base = measure.accuracy_of(as_function(sources.model), data)

    def drop_of(fraction: float) -> float:
        found = measure.accuracy_of(as_function(built(Budget(macs=fraction))), data)
        return measure.lost(data.metric, base, found)

    return search.smallest_budget(drop_of, limit, costs.of("macs", least) / costs.whole("macs"))
