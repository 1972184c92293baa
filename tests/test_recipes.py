"""Every recipe file: valid, described by a dry run, and able to prune a small stand-in for its model."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from PIL import Image

import optin_export
from optin_export.cli.dry_run.work import planned_work
from optin_export.data import load_sources
from optin_export.recipe import Recipe, load_recipe
from optin_export.report.schema import Report
from optin_export.units import find_query_keys, find_structure
from optin_export.workdir.run_directory import STAGES
from tests.conftest import ROOT, sentences, two_tower_folder
from tests.models.audio_folders import audio_folder, recordings
from tests.units.models import MODELS

RECIPES = sorted((ROOT / "recipes").rglob("*.yaml"))
NAMES = [path.relative_to(ROOT / "recipes").with_suffix("").as_posix() for path in RECIPES]
SMALL = {"num_attention_heads": 4, "intermediate_size": 64, "hidden_size": 32, "num_hidden_layers": 2}


@pytest.mark.parametrize("path", RECIPES, ids=NAMES)
def test_every_recipe_validates_and_is_described(path: Path) -> None:
    """Files that users bring themselves may be missing; those of the repository have to be there."""
    recipe = load_recipe(path)
    assert [stage for stage, _ in planned_work(recipe, Path("runs/x"))] == list(STAGES)
    sections = (recipe.data.calibration, recipe.data.evaluation, recipe.finetune and recipe.finetune.data)
    for source in (recipe.model.source, *(one.source for one in sections if one is not None)):
        file = source.removeprefix("py:").rpartition(":")[0]
        assert not file.startswith(str(ROOT / "recipes")) or Path(file).is_file()


@pytest.mark.parametrize("path", RECIPES, ids=NAMES)
def test_every_recipe_begins_with_what_it_is_for(path: Path) -> None:
    lines = path.read_text(encoding="utf-8").splitlines()
    assert lines[0].startswith("# ") and max(map(len, lines)) <= 120
    assert "recipe: 1" in lines


# --- stand-ins ------------------------------------------------------------------------------------------------------

Settings = dict[str, Any]


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with tables and images of every kind that the recipes read."""
    folder = tmp_path_factory.mktemp("rows")
    generator = np.random.default_rng(0)
    pairs = zip(sentences(48, 1), sentences(48, 2), generator.integers(0, 2, 48), strict=True)
    (folder / "pairs.tsv").write_text("".join(f"{a}\t{b}\t{label}\n" for a, b, label in pairs), encoding="utf-8")
    np.savez(
        folder / "images.npz",
        images=generator.integers(0, 256, (48, 32, 32, 3), dtype=np.uint8),
        grey=generator.integers(0, 256, (48, 32, 32), dtype=np.uint8),
        labels=generator.integers(0, 10, 48),
    )
    for index in range(12):
        place = folder / "classes" / ("n01440764", "n01443537", "n01484850")[index % 3]
        place.mkdir(parents=True, exist_ok=True)
        Image.fromarray(generator.integers(0, 256, (40, 48, 3), dtype=np.uint8)).save(place / f"{index}.png")
    for name, shape, values in (("scenes", (40, 48, 3), 256), ("maps", (40, 48), 5)):
        (folder / name).mkdir()
        for index in range(8):
            image = generator.integers(0, values, shape, dtype=np.uint8)
            Image.fromarray(image).save(folder / name / f"{index}.png")
    return folder


def _text(rows: Path, pairs: bool, labels: bool) -> Settings:
    columns = {"text": 0, **({"text_pair": 1} if pairs else {}), **({"label": 2} if labels else {})}
    return {"source": f"tsv:{rows / 'pairs.tsv'}", "columns": columns, "split": "train", "header": None}


def _pixels(rows: Path, labels: bool, image: str = "images") -> Settings:
    return {
        "source": f"npz:{rows / 'images.npz'}",
        "columns": {"image": image, **({"label": "labels"} if labels else {})},
    }


def _folders(rows: Path, labels: bool) -> Settings:
    return {"source": f"images:{rows / 'classes'}", "columns": {}}


def _scenes(rows: Path, labels: bool) -> Settings:
    return {"source": f"images:{rows / 'scenes'}", **({"label_folder": str(rows / "maps")} if labels else {})}


def _with_tokenizer_of(bert_folder: Path, folder: Path, config: Any) -> Path:
    """A folder with a bare configuration and the tokenizer of the small BERT."""
    for file in bert_folder.iterdir():
        if file.suffix in (".json", ".txt") and file.name != "config.json":
            (folder / file.name).write_bytes(file.read_bytes())
    config.save_pretrained(folder)
    return folder


class StandIn:
    """How a recipe is brought down to a size that a test can run: overrides of model and data."""

    def __init__(self, request: pytest.FixtureRequest, folder: Path, rows: Path) -> None:
        self.request, self.folder, self.rows = request, folder, rows

    def of(self, name: str, recipe: Recipe) -> Settings:
        make: dict[str, Callable[[Recipe], Settings]] = {
            "glue/": self.glue,
            "imagenet/deit": self.deit,
            "imagenet/swin": self.swin,
            "imagenet/efficientnet": self.efficientnet,
            "transfer/vit_base": self.vit_base,
            "transfer/deit": self.deit_cifar,
            "cifar_transfer": self.vit,
            "cifar_vit": self.vit,
            "cifar_vgg16": self.vgg,
            "cifar_resnet": self.resnet,
            "clip_": self.clip,
            "minilm_": self.glue,
            "mpnet_": self.glue,
            "quickstart": self.digits,
            "gpt2": self.gpt2,
            "smollm2": self.llama,
            "segmentation/": self.segmentation,
            "camvid_": self.segmentation,
            "whisper_": self.whisper,
        }
        return next(one for start, one in make.items() if name.startswith(start))(recipe)

    def _data(self, kind: Callable[..., Settings], *args: Any) -> Settings:
        return {"data.calibration": kind(self.rows, *args, False), "data.evaluation": kind(self.rows, *args, True)}

    def gpt2(self, recipe: Recipe) -> Settings:
        import transformers

        config = transformers.GPT2Config(vocab_size=40, n_positions=64, n_embd=32, n_layer=2, n_head=4)
        folder = _with_tokenizer_of(self.request.getfixturevalue("bert_folder"), self.folder, config)
        return {"model.source": str(folder), "export.sequence": 24, **self._data(_text, False)}

    def llama(self, recipe: Recipe) -> Settings:
        import transformers

        config = transformers.LlamaConfig(**SMALL, vocab_size=40, max_position_embeddings=64, num_key_value_heads=2)
        folder = _with_tokenizer_of(self.request.getfixturevalue("bert_folder"), self.folder, config)
        return {"model.source": str(folder), "export.sequence": 24, **self._data(_text, False)}

    def segmentation(self, recipe: Recipe) -> Settings:
        kind = "mask2former" if "mask2former" in recipe.name else "segformer"
        (self.folder / "config.json").write_text(json.dumps(_plain(MODELS[kind][2]()["config"])))
        size = {"size": [32, 32], "mean": [0.5], "std": [0.5]}
        return {"model.source": str(self.folder), "model.preprocess": size, **self._data(_scenes)}

    def glue(self, recipe: Recipe) -> Settings:
        import transformers

        pairs = "text_pair" in recipe.data.calibration.columns
        regression = recipe.data.evaluation is not None and recipe.data.evaluation.metric == "spearman"
        names = {"num_labels": 1} if regression else {}
        config = transformers.BertConfig(**SMALL, vocab_size=40, max_position_embeddings=64, **names)
        folder = _with_tokenizer_of(self.request.getfixturevalue("bert_folder"), self.folder, config)
        both = recipe.model.task == "feature-extraction"
        data = {
            "data.calibration": _text(self.rows, pairs, False),
            "data.evaluation": _text(self.rows, pairs or both, True),
        }
        return {"model.source": str(folder), "export.sequence": 24, **data}

    def deit(self, recipe: Recipe) -> Settings:
        args = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 4}
        return {"model.args": args, "model.preprocess": {"size": [32, 32]}, **self._data(_folders)}

    def deit_cifar(self, recipe: Recipe) -> Settings:
        assert recipe.model.args == {"num_classes": 10}
        return {**self.deit(recipe), "model.args": {**self.deit(recipe)["model.args"], "num_classes": 10}} | self._data(
            _pixels
        )

    def swin(self, recipe: Recipe) -> Settings:
        args = {"img_size": 32, "patch_size": 4, "window_size": 4, "embed_dim": 16, "depths": [2, 1]}
        args["num_heads"] = [2, 4]
        return {"model.args": args, "model.preprocess": {"size": [32, 32]}, **self._data(_folders)}

    def efficientnet(self, recipe: Recipe) -> Settings:
        # The smallest of the kind whose blocks are given by name.
        small = {"model.source": "timm:tinynet_e"}
        return {**small, "model.preprocess": {"size": [32, 32]}, **self._data(_folders)}

    def vit_base(self, recipe: Recipe) -> Settings:
        import transformers

        labels = {index: f"class {index}" for index in range(10)}
        transformers.ViTConfig(**SMALL, image_size=32, patch_size=8, id2label=labels).save_pretrained(self.folder)
        return {"model.source": str(self.folder), **self._data(_pixels)}

    def vit(self, recipe: Recipe) -> Settings:
        return {"model.args": {**recipe.model.args, "embed_dim": 32, "depth": 2, "num_heads": 4}, **self._data(_pixels)}

    def digits(self, recipe: Recipe) -> Settings:
        def grey(rows: Path, labels: bool) -> Settings:
            return _pixels(rows, labels, "grey")

        return {**self.vit(recipe), **self._data(grey)}

    def vgg(self, recipe: Recipe) -> Settings:
        return {"model.args": {"divisor": 8}, **self._data(_pixels)}

    def resnet(self, recipe: Recipe) -> Settings:
        return {"model.args": {"depth": 8}, **self._data(_pixels)}

    def clip(self, recipe: Recipe) -> Settings:
        return {"model.source": str(two_tower_folder(self.folder, "CLIP")), **self._data(_pixels)}

    def whisper(self, recipe: Recipe) -> Settings:
        sound = recordings(self.folder / "wav", (4000, 9000, 16000, 12000))
        return {
            "model.source": str(audio_folder(self.folder, "whisper")),
            "data.calibration": {"source": f"wav:{sound}"},
        }


def _plain(value: Any) -> Any:
    """A configuration as JSON holds it."""
    if isinstance(value, dict):
        return {key: _plain(one) for key, one in value.items()}
    return value.to_dict() if hasattr(value, "to_dict") else list(value) if isinstance(value, tuple) else value


def small(settings: Settings, path: Path) -> Recipe:
    """The recipe with a random model, these settings, and little of everything."""
    raw = yaml.safe_load(path.read_text(encoding="utf-8"))
    for part in raw["data"]:
        kept = {"metric": raw["data"][part]["metric"]} if "metric" in raw["data"][part] else {}
        settings[f"data.{part}"] = {**settings[f"data.{part}"], **kept, "samples": 40}
    settings |= {"model.weights": "random", "prune.score_samples": 16, "prune.curve_samples": 16, "prune.probes": 4}
    settings |= {"prune.rows": 64, "prune.align": 4, "prune.budget": {"macs": 0.8}}
    if "finetune" in raw:
        settings["finetune.steps"] = 3
    return load_recipe(path, [f"{key}={json.dumps(value)}" for key, value in settings.items()])


#: Those with the most groups of all; the family tests take Mask2Former the same way.
SLOW = ("mask2former", "efficientnet")
STAND_INS = [
    pytest.param(path, marks=pytest.mark.slow) if any(one in path.stem for one in SLOW) else path for path in RECIPES
]


@pytest.mark.parametrize("path", STAND_INS, ids=NAMES)
def test_every_recipe_prunes_a_small_stand_in(
    path: Path, rows: Path, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    """Its sections as they are, with a tiny random model and data of the same kind: up to the repaired model."""
    recipe = load_recipe(path)
    name = path.relative_to(ROOT / "recipes").with_suffix("").as_posix()
    made = small(StandIn(request, tmp_path, rows).of(name, recipe), path)
    sources = load_sources(made)
    structure = find_structure(sources.model, made.prune.coupled, inputs=sources.fixed(2))
    assert {group.kind for group in structure.groups} >= set(made.prune.group_kinds)
    assert bool(find_query_keys(sources.model, structure)) >= ("dimensions" in made.prune.units)
    report: Report | None = optin_export.run(made, out=tmp_path / "run", stop_after="surgery")
    assert report is None
    assert (tmp_path / "run" / "repaired").exists() == (made.finetune is not None)
    model = optin_export.load_model(tmp_path / "run" / "model", trust_python=True)
    assert model(**sources.fixed(2)).shape == sources.model(**sources.fixed(2)).shape
