"""Try plans before the repair: build each, repair it on a few rows, and judge it on rows that it has not seen.

Losses of single groups do not add up: what one group loses, the next ones get as their input, and together they can
lose several times the sum. A model that is built shows what they lose together. So plans that share the budget by
different rules are tried; the best of them is the run's plan, and its loss is what the run predicts.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch

from optin_export.data import Batch
from optin_export.models import TaskModel
from optin_export.objective import Reference, compared_output, output_losses
from optin_export.progress import advance, phase, task
from optin_export.search import Plan, PlanTrial, PlanTrials

#: Calibration rows on which a plan is repaired to try it.
TRIAL_ROWS = 256
#: Share of the divergence by which another rule must be better than the default one: smaller gains are chance.
MARGIN = 0.05


def trial_batches(calibration: Sequence[Batch], judged: Sequence[Batch]) -> list[int]:
    """Indices of evenly spread batches with about TRIAL_ROWS rows, none of them `judged`, if there are others."""
    known = set(map(id, judged))
    others = [index for index, batch in enumerate(calibration) if id(batch) not in known] or range(len(calibration))
    rows = sum(len(calibration[index].rows) for index in others)
    return list(others[:: max(1, rows // TRIAL_ROWS)])


def try_plans(
    plans: Mapping[str, Plan],
    built: Callable[[Plan], TaskModel],
    references: Reference,
    *,
    fitted: int,
    temperature: float,
) -> Plan:
    """The plan whose model is closest to the unpruned one on the rows of `references`, with all `trials` in it.

    plans: by the name of their rule, the default one first; equal plans are built once. built: a plan -> its model,
    repaired on `fitted` other rows. The default plan stays unless another is better by more than MARGIN.
    """
    phase("trying plans", until=1.0)
    references.observe()
    found: dict[str, PlanTrial] = {}
    with task(len(plans)):
        for rule, plan in plans.items():
            same = next((one for one in found if plans[one].groups == plan.groups), None)
            if same is None:
                divergence, changed = judge(built(plan), references, temperature)
                found[rule] = PlanTrial(rule=rule, divergence=divergence, changed=changed)
            advance()
    rules = list(found)
    best = min(rules, key=lambda rule: found[rule].divergence)
    if found[best].divergence > (1 - MARGIN) * found[rules[0]].divergence:
        best = rules[0]
    trials = PlanTrials(
        fitted=fitted, judged=references.samples, chosen=rules.index(best), tried=tuple(found[rule] for rule in rules)
    )
    return plans[best].model_copy(update={"trials": trials})


def judge(model: TaskModel, references: Sequence, temperature: float) -> tuple[float, float | None]:
    """Of a model's outputs: the mean divergence from the unpruned model's per sample, and the share of them (a sample's
    compared rows count as one) whose largest logit is another; None for outputs that are no classes."""
    total, changed, samples = 0.0, 0.0, 0
    classes = model.output_kind == "logits"
    with torch.no_grad():
        for reference in references:
            output = model(**reference.inputs)
            total += float(output_losses(model, reference, output, temperature).sum())
            samples += len(reference)
            if classes:
                rows = compared_output(model, reference, output)
                other = rows.argmax(-1) != reference.output.argmax(-1)
                changed += float((other * reference.weights).sum())
    return total / samples, changed / samples if classes else None
