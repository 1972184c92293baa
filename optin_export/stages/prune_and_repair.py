"""Stage `surgery`: build the dense model, repair it, and fine-tune it if the recipe asks for it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from optin_export import pruning, repair
from optin_export.errors import InputError
from optin_export.models import TaskModel
from optin_export.search import Plan
from optin_export.stages.context import FILES, RunContext
from optin_export.stages.prediction import is_large
from optin_export.stages.results import PruneResult
from optin_export.units import count_macs, count_params
from optin_export.workdir.files import remove, sha256_file

#: Images of the calibration data on which the report shows what was merged.
SHOWN = 4


def apply_plan(work: RunContext, plan: Plan) -> PruneResult:
    """Apply the plan and write `model/`; returns the repair's results, and the size of the pruned model."""
    tuned, prune = _tunes(work, plan), work.recipe.prune
    folder = work.folder / ("repaired" if tuned else "model")

    def run() -> PruneResult:
        sources = work.sources
        inputs, operation = sources.fixed(2), work.operation(plan)
        pruning.save_model(folder, operation.dense, sources.loaded.architecture, work.structure, plan, inputs)
        _check_saved(folder, operation.dense, work)
        pruning.save_places(folder / "places.safetensors", operation.dense, sources.fixed(SHOWN))
        one = sources.fixed(1)
        macs, params = count_macs(operation.dense, one), count_params(operation.dense)
        return PruneResult(macs, params, operation.masked_difference, operation.repairs)

    inputs = {
        **work.calibration_digest,
        "plan": sha256_file(work.folder / "plan" / "plan.json"),
        "compensate": prune.compensate,
        "autocast": prune.autocast,
        "gauss_newton": {"temperature": prune.temperature} if work.refines else None,
        "folder": folder.name,
        "seed": work.recipe.seed,
    }
    done = work.cache.step("repair", "surgery", inputs, [folder / name for name in FILES], run, PruneResult)
    if tuned:
        return replace(done, finetuned=_fine_tune(work, plan))
    remove(work.folder / "repaired")
    return done


def _tunes(work: RunContext, plan: Plan) -> bool:
    """Whether weights are trained after the closed-form repair; `prune.repair: auto` decides by the predicted loss."""
    recipe = work.recipe
    if recipe.finetune is None and recipe.prune.repair == "auto":
        return is_large(plan, work.sources.model.output_kind)
    return recipe.tuning is not None


def _check_saved(folder: Path, dense: TaskModel, work: RunContext) -> None:
    """All that follows is done with the model as it is loaded: it must be the one that was checked and repaired."""
    reason = pruning.difference(dense, pruning.load_model(folder, work.python), work.sources.fixed(2))
    if reason is not None:
        raise InputError(
            "the pruned model, saved and loaded again, is another one",
            f"{reason}; a module of it computes in its first pass what it then keeps, or is not built alike twice",
            "let the modules compute the same in every pass, or name other kinds in prune.units",
        )


def _fine_tune(work: RunContext, plan: Plan) -> repair.FineTune:
    """Fine-tune the repaired model in `repaired/`, as the recipe says, into `model/`; returns a summary."""
    section, prune = work.recipe.tuning, work.recipe.prune
    assert section is not None
    repaired, folder = work.folder / "repaired", work.folder / "model"

    def run() -> repair.FineTune:
        sources = work.sources
        training, held_out = sources.training()
        tuned, outcome = repair.fine_tune(
            sources.model,
            work.structure,
            pruning.load_model(repaired, work.python),
            training,
            held_out,
            section,
            temperature=prune.temperature,
            seed=work.recipe.seed,
        )
        architecture, structure = sources.loaded.architecture, work.structure
        pruning.save_model(folder, tuned, architecture, structure, plan, sources.fixed(2))
        pruning.save_places(folder / "places.safetensors", tuned, sources.fixed(SHOWN))
        return outcome

    inputs = {
        "repaired": {name: sha256_file(repaired / name) for name in FILES},
        "digest": {name: value for name, value in work.digest.items() if name != "evaluation"},
        "finetune": section.model_dump(mode="json"),
        "function": _code_of(section.source),
        "temperature": prune.temperature,
        "seed": work.recipe.seed,
    }
    return work.cache.step(
        "repair", "surgery.finetune", inputs, [folder / name for name in FILES], run, repair.FineTune
    )


def _code_of(source: str | None) -> str | None:
    """Hash of the user's file, because another function gives another fine-tune."""
    path = Path((source or "").removeprefix("py:").rpartition(":")[0])
    return sha256_file(path) if path.suffix == ".py" else None
