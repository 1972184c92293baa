"""Labels made by the reference library itself: the unpruned accuracy of a whole run is exactly 100."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
import transformers
import yaml
from PIL import Image

from optin_export import cli
from optin_export.data import Sources, load_sources
from optin_export.data.readers import load_examples
from optin_export.measure import accuracy_of
from optin_export.models import as_function
from optin_export.recipe import DataSource, load_recipe, validate
from tests.conftest import enlarge, sentences
from tests.textmodels import SMALL, word_pieces

pytestmark = pytest.mark.usefixtures("short_measurement")
Go = Callable[..., dict[str, Any]]


@pytest.fixture
def go(tmp_path: Path) -> Go:
    """Runs the command on a model and labelled data; returns report.json."""

    def go(
        model: dict[str, Any],
        data: dict[str, Any],
        code: tuple[int, ...] = (0, 4),
        evaluation: dict[str, Any] | None = None,
    ) -> dict[str, Any]:
        raw = {
            "recipe": 1,
            "name": "labels",
            "model": model,
            "data": {"calibration": data, "evaluation": {**(evaluation or data), "metric": "accuracy"}},
            "prune": {"budget": {"macs": 0.95}, "score": "magnitude", "allocation": "additive", "compensate": False},
            "export": {"batch": [4], **({} if "image" in model["task"] else {"sequence": 16})},
        }
        (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(raw), encoding="utf-8")
        assert cli.main([str(tmp_path / "recipe.yaml"), "--out", str(tmp_path / "run")]) in code
        report = tmp_path / "run" / "report.json"
        return json.loads(report.read_text(encoding="utf-8")) if report.is_file() else {}

    return go


def classifier(folder: Path, names: tuple[str, ...]) -> Path:
    """A BERT that answers with these names."""
    folder.mkdir()
    words = word_pieces(folder)
    settings = transformers.BertConfig(
        vocab_size=words, id2label=dict(enumerate(names)), label2id={name: i for i, name in enumerate(names)}, **SMALL
    )
    model = enlarge(transformers.BertForSequenceClassification(settings), 3)
    torch.nn.init.zeros_(model.classifier.bias)
    model.save_pretrained(folder)
    return folder


def change_config(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    raw = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    change(raw)
    (folder / "config.json").write_text(json.dumps(raw), encoding="utf-8")


def write_table(path: Path, rows: list[tuple[str, str]]) -> dict[str, Any]:
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([("text", "label"), *rows])
    return {"source": f"csv:{path}", "columns": {"text": "text", "label": "label"}}


def predicted(folder: Path, texts: list[str]) -> list[str]:
    """What transformers' pipeline calls each text."""
    pipeline = transformers.pipeline("text-classification", model=str(folder))
    found = [one["label"] for one in pipeline(texts)]
    assert len(set(found)) > 1
    return found


def accuracy_of_loaded(folder: Path, data: dict[str, Any]) -> tuple[float, Sources]:
    """Of the unpruned torch model, by the labels that a run would use."""
    raw = {
        "recipe": 1,
        "name": "labels",
        "model": {"source": str(folder), "task": "text-classification"},
        "data": {"calibration": data, "evaluation": {**data, "metric": "accuracy"}},
        "prune": {"budget": {"macs": 0.95}},
        "export": {"sequence": 16},
    }
    sources = load_sources(validate(raw, Path("/")))
    dataset = sources.evaluation()
    assert dataset is not None
    return accuracy_of(as_function(sources.model), dataset), sources


@pytest.mark.parametrize("names", [("neutral", "good", "bad"), ("1", "2", "3")])
def test_names_that_a_pipeline_gives(names: tuple[str, ...], go: Go, tmp_path: Path) -> None:
    folder = classifier(tmp_path / "model", names)
    texts = sentences(60, 5)
    data = write_table(tmp_path / "rows.csv", list(zip(texts, predicted(folder, texts), strict=True)))
    report = go({"source": str(folder), "task": "text-classification"}, data)
    assert report["accuracy"]["base"] == report["accuracy"]["engines"]["base"] == 100.0
    assert report["accuracy"]["warning"] is None and 0 < report["accuracy"]["chance"] < 100
    labels = tmp_path / "run" / "preprocess" / "labels.txt"
    assert labels.read_text().split() == list(names)


def test_a_configuration_of_label2id_alone(go: Go, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """transformers forgets these names, and the number of classes with them."""
    names = ("neutral", "good", "bad")
    folder = classifier(tmp_path / "model", names)
    texts = sentences(60, 5)
    data = write_table(tmp_path / "rows.csv", list(zip(texts, predicted(folder, texts), strict=True)))
    change_config(folder, lambda raw: raw.pop("id2label"))
    model = {"source": str(folder), "task": "text-classification"}
    report = go(model, data)
    assert report["accuracy"]["base"] == 100.0
    assert (tmp_path / "run" / "preprocess" / "labels.txt").read_text().split() == list(names)
    # Wrong indices cannot be told from right ones, but that the model is at chance level can.
    wrong = write_table(tmp_path / "wrong.csv", [(text, str(i % 3)) for i, text in enumerate(texts)])
    capsys.readouterr()
    report = go(model, data, evaluation=wrong)
    assert "not surely better than" in report["accuracy"]["warning"] == report["warnings"][0]
    assert "not surely better than" in capsys.readouterr().out
    assert "not surely better than" in (tmp_path / "run" / "report.html").read_text(encoding="utf-8")


def test_generic_names_are_those_of_the_pipeline(tmp_path: Path) -> None:
    folder = classifier(tmp_path / "model", ("LABEL_0", "LABEL_1", "LABEL_2"))
    texts = sentences(60, 5)
    data = write_table(tmp_path / "rows.csv", list(zip(texts, predicted(folder, texts), strict=True)))
    accuracy, sources = accuracy_of_loaded(folder, data)
    assert accuracy == 100.0 and not sources.names.real


def test_names_that_contradict_each_other_are_those_of_the_pipeline(tmp_path: Path) -> None:
    names = ("neutral", "good", "bad")
    folder = classifier(tmp_path / "model", names)
    change_config(folder, lambda raw: raw.update(label2id={"good": 0, "bad": 1, "neutral": 2}))
    texts = sentences(60, 5)
    data = write_table(tmp_path / "rows.csv", list(zip(texts, predicted(folder, texts), strict=True)))
    accuracy, sources = accuracy_of_loaded(folder, data)
    assert accuracy == 100.0 and any("contradict" in text for text in sources.warnings)


def test_labels_beyond_the_classes_end_before_any_work(
    go: Go, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = classifier(tmp_path / "model", ("neutral", "good", "bad"))
    data = write_table(tmp_path / "rows.csv", [(text, str(i % 3 + 1)) for i, text in enumerate(sentences(9))])
    assert go({"source": str(folder), "task": "text-classification"}, data, (2,)) == {}
    assert "label 3 of line 4" in (said := capsys.readouterr().err) and "subtract one" in said
    assert not (tmp_path / "run" / "scores").exists()


def test_names_of_words(go: Go, tmp_path: Path) -> None:
    names = ("I-THING", "O", "B-THING")
    folder = tmp_path / "model"
    folder.mkdir()
    config = transformers.BertConfig(
        vocab_size=word_pieces(folder),
        id2label=dict(enumerate(names)),
        label2id={n: i for i, n in enumerate(names)},
        **SMALL,
    )
    model = enlarge(transformers.BertForTokenClassification(config), 3).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    words = [text.split() for text in sentences(40, 5)]
    with torch.no_grad():  # as many words of one class as of another
        encoded = tokenizer(words, is_split_into_words=True, padding=True, return_tensors="pt")
        logits = model(**encoded).logits[encoded["attention_mask"] == 1]
        model.classifier.bias -= logits.mean(0)
    model.save_pretrained(folder)
    tags = []
    for row in words:
        encoded = tokenizer(row, is_split_into_words=True, return_tensors="pt")
        with torch.no_grad():
            classes = model(**encoded).logits[0].argmax(-1).tolist()
        at = encoded.word_ids(0)
        tags.append([names[classes[at.index(word)]].lower() for word in range(len(row))])
    assert len({tag for row in tags for tag in row}) == 3
    (tmp_path / "rows.py").write_text(
        f"def rows(): return {{'tokens': {words!r}, 'label': {tags!r}}}", encoding="utf-8"
    )
    report = go({"source": str(folder), "task": "token-classification"}, {"source": f"py:{tmp_path / 'rows.py'}:rows"})
    assert report["accuracy"]["base"] == 100.0


def pictures(count: int, size: int) -> list[np.ndarray]:
    """Images of plain, noisy colours, which random models tell apart."""
    generator = np.random.default_rng(0)
    colours = generator.integers(0, 256, (count, 1, 1, 3))
    return list((colours + generator.normal(0, 10, (count, size, size, 3))).clip(0, 255).astype(np.uint8))


def test_class_folders_in_another_order_and_less_of_them(go: Go, tmp_path: Path) -> None:
    """Names of the model in its own order, folders in the alphabet's, in capitals, and not of every class."""
    names = ("wolf", "red fox", "zebra", "ant", "moth")
    config = transformers.ViTConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64, image_size=32, patch_size=8,
        id2label=dict(enumerate(names)), label2id={name: i for i, name in enumerate(names)},
    )  # fmt: skip
    model = enlarge(transformers.ViTForImageClassification(config), 1).eval()
    model.save_pretrained(tmp_path / "model")
    processor = transformers.ViTImageProcessor(size={"height": 32, "width": 32})
    processor.save_pretrained(tmp_path / "model")
    found = set()
    for number, pixels in enumerate(pictures(60, 32)):
        image = Image.fromarray(pixels)
        with torch.no_grad():
            index = int(model(**processor(image, return_tensors="pt")).logits.argmax())
        found.add(index)
        place = tmp_path / "photos" / names[index].title().replace(" ", "_")
        place.mkdir(parents=True, exist_ok=True)
        image.save(place / f"{number}.png")
    assert len(found) > 1
    source = {"source": f"images:{tmp_path / 'photos'}"}
    report = go({"source": str(tmp_path / "model"), "task": "image-classification"}, source)
    assert report["accuracy"]["base"] == 100.0
    assert (tmp_path / "run" / "preprocess" / "labels.txt").read_text().splitlines() == list(names)


def test_folders_of_wordnets_numbers(go: Go, tmp_path: Path) -> None:
    """A few classes of ImageNet, for a timm model of all 1000."""
    from safetensors.torch import save_file

    model = enlarge(timm.create_model("test_vit", pretrained=False), 2).eval()
    save_file(model.state_dict(), tmp_path / "weights.safetensors")
    transform = timm.data.create_transform(**timm.data.resolve_data_config({}, model=model))
    info, found = timm.data.ImageNetInfo(), set()
    for number, pixels in enumerate(pictures(24, 160)):
        image = Image.fromarray(pixels)
        with torch.no_grad():
            index = int(model(transform(image)[None]).argmax())
        found.add(index)
        place = tmp_path / "photos" / info.index_to_label_name(index)
        place.mkdir(parents=True, exist_ok=True)
        image.save(place / f"{number}.png")
    assert len(found) > 1
    source = {
        "source": "timm:test_vit",
        "task": "image-classification",
        "weights": str(tmp_path / "weights.safetensors"),
    }
    report = go(source, {"source": f"images:{tmp_path / 'photos'}"})
    assert report["accuracy"]["base"] == 100.0
    lines = (tmp_path / "run" / "preprocess" / "labels.txt").read_text(encoding="utf-8").splitlines()
    assert len(lines) == 1000 and lines[0] == "tench, Tinca tinca"


def test_init_then_run_on_columns_of_the_usual_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = classifier(tmp_path / "model", ("neutral", "good", "bad"))
    texts = sentences(40, 5)
    write_table(tmp_path / "rows.csv", list(zip(texts, predicted(folder, texts), strict=True)))
    monkeypatch.chdir(tmp_path)
    words = ["--model", "model", "--data", "csv:rows.csv", "--evaluation", "csv:rows.csv", "--goal", "macs=0.95"]
    assert cli.main(["init", *words, "--out", "first.yaml"]) == 0
    assert cli.main(["first.yaml", "--out", "run", "--stop-after", "sources"]) == 0
    assert load_recipe("first.yaml").data.evaluation.columns == {"text": "text", "label": "label"}  # type: ignore[union-attr]
    # Columns may be left out where the header has the usual names.
    accuracy, _ = accuracy_of_loaded(folder, {"source": f"csv:{tmp_path / 'rows.csv'}"})
    assert accuracy == 100.0


def test_init_then_run_on_an_archive_with_singular_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    images = np.random.default_rng(0).integers(0, 256, (12, 32, 32, 3), dtype=np.uint8)
    np.savez(tmp_path / "rows.npz", image=images, label=np.arange(12) % 4)
    monkeypatch.chdir(tmp_path)
    words = ["--model", "timm:test_vit", "--data", "npz:rows.npz", "--evaluation", "npz:rows.npz", "--goal", "macs=0.9"]
    assert cli.main(["init", *words, "--weights", "random", "--out", "first.yaml"]) == 0
    assert cli.main(["first.yaml", "--out", "run", "--stop-after", "sources"]) == 0
    section = DataSource(source=f"npz:{tmp_path / 'rows.npz'}")
    assert np.array_equal(load_examples(section, ("image", "label"), 0).columns["image"], images)
