"""The run folder: where it is, and the names of the stages that fill it."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import TYPE_CHECKING

from optin_export.errors import InputError
from optin_export.workdir.files import HALF_WRITTEN, remove

if TYPE_CHECKING:
    from optin_export.recipe import Recipe

#: Allowed content of a folder in which a run was killed before it had written its recipe.
_JUST_BEGUN = re.compile(r"\.stages|\.tmp-[0-9a-f]{16}\.yaml")
#: In the order in which the pipeline runs them.
STAGES = ("sources", "scoring", "curves", "search", "surgery", "export", "engines", "measure", "ship", "report")

#: Content of a run folder: patterns of paths -> description; the first match counts. docs/ is generated from it.
CONTENTS = {
    "recipe.yaml": "the resolved recipe; runs by itself",
    "report.json": "everything the run found out",
    "report.html": "the same as one page that loads nothing",
    "manifest.json": "sha256 of every artefact, versions, hardware, seed, hash of the recipe",
    "scores/scores.safetensors": "one float64 tensor per block and unit kind, e.g. block03.neurons",
    "scores/curves.safetensors": "allocation: joint; per block and unit kind: units kept, trajectory loss, output loss",
    "plan/plan.json": "kept indices, predicted MACs and parameters; with a budget in time also every plan that was "
    "built and measured for it",
    "plan/latency_table.json": "with a budget in time: what engines of the target save where fewer units stay; "
    "measured again if target, versions, machine, shapes or architecture change",
    "model/architecture.json": "the pruned model's layers, for `optin_export.load_model`",
    "model/model.safetensors": "its weights",
    "model/places.safetensors": "where tokens of images are merged: a few images, and which token stands for each one",
    "repaired/*": "with finetune: the model before it",
    "preprocess/*": "what turns text or an image into the model's inputs: tokenizer.json, prompt.txt (put before every "
    "text), preprocess.json, labels.txt",
    "onnx/base.onnx": "the unpruned graph, in fp32",
    "onnx/pruned.onnx": "the pruned graph, in fp32",
    "onnx/*.*.onnx": "both in the recipe's precision, where that is not fp32, e.g. pruned.int8.onnx; engines likewise",
    "onnx/*.onnx.data": "weights of a graph, if they exceed the 2 GiB that protobuf holds",
    "onnx/*.xml": "both in int8 as OpenVINO's graphs, for openvino targets",
    "onnx/*.bin": "the weights of such a graph",
    "onnx/*.pt2": "both as programs of torch, for torch targets",
    "engines/*/*.onnx": "graphs as onnxruntime optimised them for this machine, by target",
    "engines/*/*.onnx.data": "weights of such a graph, if they are in a file of their own",
    "engines/*/*.xml": "OpenVINO's graphs, by target",
    "engines/*/*.bin": "the weights of such a graph",
    "engines/*/*.pt2": "programs of torch, by target",
    "engines/*/*.plan": "TensorRT engines, by target",
    "engines/*/*.plan.json": "the record of one: sha256, version, GPU",
    "engines/*/*.plan.layers.json": "its layers",
    "measure/parity.json": "every engine against the fp32 torch model",
    "measure/accuracy.json": "points of the engines, with their interval",
    "measure/latency.json": "every single measured call",
    "measure/candidates.json": "with engine: auto, every engine that was considered",
    "measure/reference.safetensors": "real rows, and what both torch models answer to them",
    "measure/footprint.json": "load time and memory of one instance of each shipped graph, on the machine that shipped",
    "measure/serving.json": "what `optin-export tune` measured: rows a second by instances, request size and clients",
    "measure/deployed.json": "what clients measured of the served models, with every block",
    "machines/*": "what `optin-export measure` built and measured elsewhere: engines/, measure/TARGET.json",
    "triton/*": "the Triton model repository: NAME/config.pbtxt, 1/, warmup/, manifest.json, and NAME-base",
    "cluster/*": "with --cluster: a log per worker, costs.json by stage, fleet.json with targets without a node",
    "tensorboard/*": "with --log tensorboard: its event files",
    "sweep.json": "of a sweep: its runs, each in a folder of its own",
    "compare.html": "of a sweep: its runs side by side",
    ".shared/*": "of a sweep: what all its runs use",
    ".stages/*": "what each step was made from (it is skipped only if all of that is unchanged), how long stages "
    "took, and who works here now",
    ".triton.optin-export/*": "what the last shipment replaced",
}


def run_folder(recipe: Recipe, out: str | Path | None) -> Path:
    """The run folder. Raises InputError if `out` is a file, or a folder that holds anything but a run."""
    folder = Path(out) if out is not None else Path("runs") / recipe.name
    try:
        if folder.exists() and not folder.is_dir():
            raise InputError(f"{folder} is a file", "a run needs a folder", "choose another --out")
        begun = folder.is_dir() and (is_run(folder) or all(_JUST_BEGUN.fullmatch(one.name) for one in folder.iterdir()))
        if folder.is_dir() and not begun:
            raise InputError(
                f"{folder} is not a run folder", "it holds other files", "name a new or empty folder with --out"
            )
    except (OSError, ValueError) as error:  # no permission, a name too long, a null byte
        raise InputError(f"cannot use {folder} as the run folder", str(error), "choose another --out") from None
    return folder


def is_run(folder: Path) -> bool:
    """Whether a run was begun in this folder."""
    return (folder / "recipe.yaml").is_file()


def existing_run(folder: Path) -> Path:
    """The folder, if a run was begun in it. Raises InputError."""
    try:
        found = is_run(folder)
    except (OSError, ValueError):
        found = False
    if found:
        return folder
    if (folder / "architecture.json").is_file():
        raise _model_alone(folder)
    raise InputError(f"{folder} is not a run folder", "it has no recipe.yaml", "give the folder of a finished run")


def _model_alone(folder: Path) -> InputError:
    """The error for a folder that `Pruned.save` wrote, or for `model/` of a run."""
    run = folder.resolve().parent
    return InputError(
        f"{folder} holds a model, not a run",
        "it has the weights alone, without the recipe, the report and the rows that a run has",
        f"give {run}, the run that it is in"
        if is_run(run)
        else "run a recipe and give its folder; in Python, optin_export.load_model loads this one",
    )


def leftovers(folder: Path) -> list[Path]:
    """Partly written files that a killed process left in a run folder; no other process may be working there."""
    found = [folder / "plan" / ".trials"]
    staged = folder / ".triton.optin-export"
    if not (staged / "journal.json").exists():  # with it, staged folders may hold the only copy
        found += staged.glob("staging-*")
    found = [path for path in found if path.is_dir() and not path.is_symlink()]
    for place, folders, names in os.walk(folder):  # does not follow links
        # The runs of a sweep clear their own folders: another process may be working in one of them.
        folders[:] = [name for name in folders if not is_run(Path(place) / name)]
        inside = [Path(place) / name for name in (*names, *folders) if HALF_WRITTEN.fullmatch(name)]
        found += [path for path in inside if not (path.is_symlink() and path.is_dir())]
    return found


def forget(folder: Path, stage: str) -> None:
    """Forget that `stage` and the stages after it were done in a run folder, or in the runs of a sweep: they depend on
    it, and the next run executes them again."""
    again = STAGES[STAGES.index(stage) :]
    for place in (folder, *(path.parent for path in folder.glob("*/recipe.yaml"))):
        for record in (place / ".stages").glob("*.json"):
            if record.name.partition(".")[0] in again:
                remove(record)
    if stage in ("sources", "scoring"):
        remove(folder / "cluster" / "shards")
    remove(folder / ".shared")


def clear_leftovers(folder: Path) -> None:
    for path in leftovers(folder):
        remove(path)
