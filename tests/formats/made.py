"""What a finished run holds of its model, made in seconds: units removed by hand, nothing searched or measured."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from optin_export import pruning
from optin_export.formats.run import FinishedRun
from optin_export.models import TaskModel
from optin_export.recipe.load import validate
from optin_export.report.schema import Report
from optin_export.search import GroupPlan, Plan
from optin_export.search.plan import Cost
from optin_export.ship import Origin
from optin_export.stages.context import RunContext
from optin_export.units import Structure


def kept_units(structure: Structure) -> dict[str, GroupPlan]:
    """Others in each block: the last of a group and every third; the last block's sub-layers go as a whole."""
    plan = {}
    for group in structure.groups:
        units = range(group.count)
        kept = [unit for unit in units[:-1] if (unit + group.block) % 3] or [0]
        if group.sublayer and group.block == len(structure.blocks) - 1 and group.kind == "neurons":
            kept = []
        plan[group.key] = GroupPlan(count=group.count, kept=tuple(kept))
    return plan


def made_run(raw: dict[str, Any], folder: Path, report: Report, new_bias: str | None = None) -> FinishedRun:
    """The run of this recipe. new_bias: the end of the names of projections that get a bias, as the repair adds it."""
    recipe = validate(raw, folder)
    work = RunContext(recipe, folder, False)
    inputs, groups = work.sources.fixed(8), kept_units(work.structure)
    dense, _ = pruning.rebuild(work.sources.model, work.structure, groups, work.sources.fixed(2))
    for name, part in dense.named_modules():
        if new_bias is not None and name.endswith(new_bias) and isinstance(part, torch.nn.Linear):
            part.bias = torch.nn.Parameter(torch.randn(part.out_features), requires_grad=False)
    cost = Cost(macs=1, params=1)
    plan = Plan(budget={"macs": 0.5}, base=cost, predicted=cost, score_kept=1, optimality_gap=None, groups=groups)
    fewer = {one.name: one.count // 2 for one in work.structure.attentions[:1]}
    pruning.narrow(dense, work.structure.attentions, fewer)
    plan = plan.model_copy(update={"dimensions": fewer})
    architecture = pruning.save_model(
        folder / "model", dense, work.sources.loaded.architecture, work.structure, plan, work.sources.fixed(2)
    )
    with torch.no_grad():
        rows = {f"input.{name}": tensor.contiguous() for name, tensor in inputs.items()}
        both = {"base": work.sources.model, "pruned": dense}
        rows |= {f"output.{which}": model(**inputs).contiguous() for which, model in both.items()}
    (folder / "measure").mkdir()
    save_file(rows, folder / "measure" / "reference.safetensors")
    (folder / "onnx").mkdir()
    (folder / "onnx" / "pruned.onnx").write_bytes(b"the graph that was measured")
    return FinishedRun(Origin(folder, recipe, True, None, {}, {}), report, architecture)


def outputs_of(model: TaskModel, run: FinishedRun) -> torch.Tensor:
    with torch.no_grad():
        result: torch.Tensor = model(**run.rows[0])
    return result
