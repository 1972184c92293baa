"""Steps over a run folder that need little of the workspace: the fine-tune, and what is shipped."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from optin_export import ship, surgery
from optin_export.files import sha256_file, sha256_json

if TYPE_CHECKING:
    from optin_export.workspace import Workspace

FILES = ("architecture.json", "model.safetensors")


def fine_tune_step(work: Workspace, shown: int) -> dict[str, Any]:
    """Fine-tune the repaired model in `repaired/`, as the recipe says, into `model/`; returns what was done.

    shown: images on which the report shows merged tokens.
    """
    section, prune = work.recipe.finetune, work.recipe.prune
    assert section is not None
    repaired, folder = work.folder / "repaired", work.folder / "model"

    def run() -> dict[str, Any]:
        sources = work.sources
        training, held_out = sources.training()
        tuned, outcome = surgery.fine_tune(
            sources.model,
            surgery.load_model(repaired, trust_python=True),
            training,
            held_out,
            section,
            temperature=prune.temperature,
            seed=work.recipe.seed,
            tick=work.tick,
        )
        architecture, family = sources.loaded.architecture, work.structure.family
        surgery.save_model(folder, tuned, architecture, family, work.plan, sources.fixed(2))
        surgery.save_places(folder / "places.safetensors", tuned, sources.fixed(shown))
        return outcome.to_json()

    inputs = {
        "repaired": {name: sha256_file(repaired / name) for name in FILES},
        "digest": {name: value for name, value in work.digest.items() if name != "evaluation"},
        "finetune": section.model_dump(mode="json"),
        "function": _code_of(section.source),
        "temperature": prune.temperature,
        "seed": work.recipe.seed,
    }
    return work.ledger.step("surgery", "surgery.finetune", inputs, [folder / name for name in FILES], run)


def _code_of(source: str | None) -> str | None:
    """Hash of the user's file: another function is another fine-tune."""
    path = Path((source or "").removeprefix("py:").rpartition(":")[0])
    return sha256_file(path) if path.suffix == ".py" else None


def ship_step(work: Workspace, passed: bool) -> None:
    """A model repository only for a run that passed, and a manifest for every run."""
    recipe, repository, onnx = work.recipe, work.folder / "triton", work.folder / "onnx" / "pruned.onnx"
    if passed and recipe.ship.triton:
        written = [repository / recipe.name / name for name in ("config.pbtxt", "1/model.onnx")]

        def run() -> dict[str, Any]:
            ship.write_repository(onnx, repository, recipe.name, recipe.export.batch)
            return {}

        inputs = {"onnx": sha256_file(onnx), "batch": recipe.export.batch, "name": recipe.name}
        work.ledger.step("ship", "ship.triton", inputs, written, run)
    elif repository.exists():
        shutil.rmtree(repository)
    ship.write_manifest(
        work.folder,
        {
            "recipe": sha256_json(recipe.model_dump(mode="json")),
            "model": recipe.model.source,
            "inputs": work.digest,
            "seed": recipe.seed,
            "passed": passed,
            "environment": work.environment,
        },
    )
