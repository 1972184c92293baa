"""From rows to tensors: which inputs, shapes and order, and one clear InputError for rows that do not fit."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from optin_export.data import Examples, Sources, load_sources
from optin_export.data.batches import batches
from optin_export.errors import InputError
from optin_export.recipe import validate
from tests.conftest import VIT_ARGS, Make, sentences


def load(raw: dict[str, Any]) -> Sources:
    return load_sources(validate(raw, Path("/")))


def refused(raw: dict[str, Any]) -> InputError:
    with pytest.raises(InputError) as caught:
        load(raw)
    assert str(caught.value).count("\n") == 2 and caught.value.why
    return caught.value


def table(path: Path, rows: list[tuple[Any, ...]]) -> str:
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows(rows)
    return f"csv:{path}"


def classifier_data(source: str, columns: dict[str, int], calibration: dict[str, int] | None = None) -> dict[str, Any]:
    given = columns if calibration is None else calibration
    unlabelled = {name: column for name, column in given.items() if name != "label"}
    return {
        "calibration": {"source": source, "columns": unlabelled},
        "evaluation": {"source": source, "columns": columns, "metric": "accuracy"},
    }


# --- text -----------------------------------------------------------------------------------------------------------


def test_segment_ids_are_an_input_for_classified_pairs_only(
    bert_recipe: Make, classifier_recipe: Make, tmp_path: Path
) -> None:
    source = table(tmp_path / "pairs.csv", [(a, b, 1) for a, b in zip(sentences(6, 1), sentences(6, 2), strict=True)])
    pairs = load(classifier_recipe(data=classifier_data(source, {"text": 0, "text_pair": 1, "label": 2})))
    inputs = pairs.calibration[0].inputs
    assert set(inputs) == {"input_ids", "attention_mask", "token_type_ids"} and inputs["token_type_ids"].max() == 1
    assert len(pairs.calibration_examples) == 6

    single = load(classifier_recipe())
    assert set(single.calibration[0].inputs) == {"input_ids", "attention_mask"}

    columns = {"text": 0, "text_pair": 1}
    raw = bert_recipe()
    raw["data"]["calibration"] = {"source": source, "columns": columns}
    apart = load(raw)  # embedded apart: each sentence is a row of its own
    assert set(apart.calibration[0].inputs) == {"input_ids", "attention_mask"} and len(apart.calibration_examples) == 12


def test_pairs_in_one_data_set_and_not_in_the_other_are_refused(classifier_recipe: Make, tmp_path: Path) -> None:
    source = table(tmp_path / "pairs.csv", [("a man", "two dogs", 1)] * 4)
    pair, single = {"text": 0, "text_pair": 1, "label": 2}, {"text": 0, "label": 2}
    for evaluation, calibration in ((pair, single), (single, pair)):
        assert "text_pair" in refused(classifier_recipe(data=classifier_data(source, evaluation, calibration))).why


def test_text_is_int64_padded_to_the_longest_row_or_as_asked(bert_recipe: Make) -> None:
    sources = load(bert_recipe())
    for batch in sources.calibration:
        ids, mask = batch.inputs["input_ids"], batch.inputs["attention_mask"]
        assert ids.dtype == mask.dtype == torch.int64
        assert ids.shape[1] == int(mask.sum(1).max()) <= 16
    assert sources.fixed(3)["input_ids"].shape == (3, 16)
    same = sources.fixed(3, distinct=False)["input_ids"]
    assert torch.equal(same[0], same[2]) and not torch.equal(
        sources.fixed(3)["input_ids"][0], sources.fixed(3)["input_ids"][2]
    )
    assert sources.fixed(100)["input_ids"].shape == (100, 16)  # more than there are rows: they repeat


def test_rows_tell_where_each_row_of_a_batch_was(bert_recipe: Make) -> None:
    sources = load(bert_recipe())
    examples = sources.calibration_examples
    found = list(batches(sources.processor, examples, 7))
    rows = np.concatenate([batch.rows for batch in found])
    assert sorted(rows) == list(range(len(examples))) and list(rows) != sorted(rows)
    for batch in found:
        for position, row in enumerate(batch.rows):
            alone = sources.processor.encode(examples.take([int(row)]))["input_ids"][0]
            assert torch.equal(batch.inputs["input_ids"][position][: len(alone)], alone)
    lengths = [int(batch.inputs["attention_mask"].sum(1).max()) for batch in found]
    assert lengths == sorted(lengths)


def test_evaluation_keeps_both_sides_in_step_with_the_labels(bert_recipe: Make) -> None:
    sources = load(bert_recipe())
    data = sources.evaluation()
    assert data is not None and len(data.sides) == 2
    assert data.labels.tolist() == [float(label) for label in sources.evaluation_examples.columns["label"]]  # type: ignore[union-attr]
    for side in data.sides:
        assert sorted(np.concatenate([batch.rows for batch in side])) == list(range(len(data.labels)))


@pytest.mark.parametrize(
    ("sequence", "says"),
    [(65, "the model has 64 positions"), (100_000, "the model has 64 positions"), (1, "no space"), (2, "no space")],
)
def test_a_sequence_that_cannot_be(bert_recipe: Make, sequence: int, says: str) -> None:
    assert says in refused(bert_recipe(export={"batch": [1], "sequence": sequence})).why


def test_the_shortest_and_the_longest_sequence_that_can_be(bert_recipe: Make) -> None:
    for sequence in (3, 64):
        assert load(bert_recipe(export={"batch": [1], "sequence": sequence})).fixed(2)["input_ids"].shape == (
            2,
            sequence,
        )


def test_tokenizers_that_do_not_fit(bert_recipe: Make, bert_folder: Path, tmp_path: Path) -> None:
    import transformers

    raw = bert_recipe()
    raw["model"]["tokenizer"] = str(tmp_path / "none")
    assert "tokenizer" in refused(raw).what

    larger = tmp_path / "larger"
    words = [f"[unused{index}]" for index in range(200)] + (bert_folder / "vocab.txt").read_text("utf-8").split("\n")
    larger.mkdir()
    (larger / "vocab.txt").write_text("\n".join(words), encoding="utf-8")
    transformers.BertTokenizerFast(str(larger / "vocab.txt")).save_pretrained(larger)
    raw["model"]["tokenizer"] = str(larger)
    assert "does not fit the model" in refused(raw).what

    unpadded = Path(shutil.copytree(bert_folder, tmp_path / "unpadded"))
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        if (unpadded / name).exists():
            settings = json.loads((unpadded / name).read_text(encoding="utf-8"))
            (unpadded / name).write_text(json.dumps({**settings, "pad_token": None}), encoding="utf-8")
    raw["model"]["tokenizer"] = str(unpadded)
    assert "no padding token" in refused(raw).why

    (unpadded / "tokenizer.json").write_text("{", encoding="utf-8")
    (unpadded / "vocab.txt").unlink()
    assert "cannot load the tokenizer" in refused(raw).what


# --- labels ---------------------------------------------------------------------------------------------------------


def test_labels_are_numbers_or_class_names_of_the_model(classifier_recipe: Make, tmp_path: Path) -> None:
    source = table(tmp_path / "a.csv", [("a man", "LABEL_2"), ("two dogs", "LABEL_0"), ("red house", "1")])
    data = load(classifier_recipe(data=classifier_data(source, {"text": 0, "label": 1}))).evaluation()
    assert data is not None and data.labels.tolist() == [2, 0, 1]


@pytest.mark.parametrize("label", ["positive", "label_3", "inf", "1,5"])
def test_a_label_that_is_neither_shows_before_any_work(classifier_recipe: Make, tmp_path: Path, label: str) -> None:
    source = table(tmp_path / "a.csv", [("a man", "LABEL_2"), ("two dogs", label)])
    error = refused(classifier_recipe(data=classifier_data(source, {"text": 0, "label": 1})))
    assert error.what == f"label {label!r} of line 2 is not a class of the model"


# --- images ---------------------------------------------------------------------------------------------------------


def image_recipe(make: Make, folder: Path, images: np.ndarray, labels: Any = None, **preprocess: Any) -> dict[str, Any]:
    np.savez(folder / "a.npz", images=images, labels=np.arange(len(images)) % 5 if labels is None else labels)
    source = {"source": f"npz:{folder / 'a.npz'}"}
    raw = make(data={"calibration": source, "evaluation": {**source, "metric": "accuracy"}})
    raw["model"]["preprocess"] = {**raw["model"]["preprocess"], **preprocess}
    return raw


def numbers(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)


def test_arrays_of_bytes_are_resized_and_normalised(vit_recipe: Make, tmp_path: Path) -> None:
    for images in (numbers(4, 32, 32), numbers(4, 32, 32, 1)):
        pixels = load(image_recipe(vit_recipe, tmp_path, images)).calibration[0].inputs["pixel_values"]
        expected = (torch.from_numpy(images.reshape(4, 1, 32, 32)).float() / 255 - 0.5) / 0.5
        assert pixels.dtype == torch.float32 and torch.allclose(pixels, expected)
    grey = np.full((2, 20, 50), 255, np.uint8)
    for way in ("bilinear", "bicubic", "nearest"):
        pixels = load(image_recipe(vit_recipe, tmp_path, grey, interpolation=way)).fixed(2)["pixel_values"]
        assert pixels.shape == (2, 1, 32, 32) and torch.allclose(pixels, torch.ones(1))


def test_arrays_of_floats_are_left_as_they_are(vit_recipe: Make, tmp_path: Path) -> None:
    images = np.random.default_rng(0).normal(size=(4, 1, 32, 32))
    pixels = load(image_recipe(vit_recipe, tmp_path, images)).calibration[0].inputs["pixel_values"]
    assert torch.equal(pixels, torch.from_numpy(images).float())


@pytest.mark.parametrize(
    ("images", "says"),
    [
        (numbers(4, 32, 32, 3), "3 channel(s), the model takes 1"),
        (numbers(4, 3, 32, 32), "32 channel(s), the model takes 1"),
        (np.zeros((4, 3, 32, 32)), "3 channel(s), the model takes 1"),
        (np.zeros((4, 1, 16, 16)), "(1, 16, 16), the model takes (1, 32, 32)"),
        (np.zeros((4, 32, 32)), "float64 [32, 32]"),
        (numbers(4, 32), "uint8 [32]"),
        (numbers(4), "uint8 []"),
        (numbers(4, 0, 32), "uint8 [0, 32]"),
        (numbers(2, 1, 1, 32, 32), "uint8 [1, 1, 32, 32]"),
        (np.full((4, 1, 32, 32), np.nan), "NaN"),
        (np.full((4, 1, 32, 32), 1e38), "overflow"),
        (np.array(["a", "b"]), "str"),
        (np.zeros((2, 32, 32), complex), "list"),
    ],
)
def test_arrays_that_do_not_fit(vit_recipe: Make, tmp_path: Path, images: np.ndarray, says: str) -> None:
    error = refused(image_recipe(vit_recipe, tmp_path, images))
    assert says in f"{error.what}; {error.why}"


def test_grey_images_are_not_silently_stretched_to_three_channels(vit_recipe: Make, tmp_path: Path) -> None:
    raw = image_recipe(vit_recipe, tmp_path, numbers(4, 32, 32))
    raw["model"] |= {"weights": "random", "args": {**VIT_ARGS, "in_chans": 3}}
    raw["model"]["preprocess"] = {"size": [32, 32], "mean": [0.5, 0.4, 0.3], "std": [0.5, 0.5, 0.5]}
    assert "1 channel(s), the model takes 3" in refused(raw).why


@pytest.mark.parametrize("field", ["mean", "std"])
def test_statistics_for_another_number_of_channels(vit_recipe: Make, tmp_path: Path, field: str) -> None:
    raw = image_recipe(vit_recipe, tmp_path, numbers(4, 32, 32), **{field: [0.5, 0.5, 0.5]})
    assert "the model takes 1 channels" in refused(raw).why


def test_a_size_the_model_does_not_take(vit_recipe: Make, tmp_path: Path) -> None:
    raw = image_recipe(vit_recipe, tmp_path, numbers(4, 32, 32), size=[40, 40])
    assert "does not run on the calibration data" in refused(raw).what


def test_evaluation_images_are_checked_before_any_work(vit_recipe: Make, tmp_path: Path) -> None:
    np.savez(tmp_path / "colour.npz", images=numbers(4, 32, 32, 3), labels=np.arange(4))
    raw = vit_recipe()
    raw["data"]["evaluation"]["source"] = f"npz:{tmp_path / 'colour.npz'}"
    assert "3 channel(s), the model takes 1" in refused(raw).why


@pytest.mark.parametrize(
    ("body", "says"),
    [
        ("return x", "[1, 1, 32, 32]"),
        ("return {'logits': x}", "[1, 1, 32, 32]"),
        ("return {'first': x, 'second': x}", "a dictionary with 'first', 'second'"),
        ("raise KeyError('inside')", "inside"),
        ("return x.flatten(1) / 0", "not finite"),
        ("return x.flatten(1) + torch.rand(())", "two passes over the same row give different outputs"),
    ],
)
def test_a_model_whose_output_is_no_logits(vit_recipe: Make, tmp_path: Path, body: str, says: str) -> None:
    code = f"import torch\nclass M(torch.nn.Sequential):\n    def forward(self, x):\n        {body}\n"
    code += "def model(): return M(torch.nn.Conv2d(1, 1, 1))\n"
    (tmp_path / "own.py").write_text(code, encoding="utf-8")
    raw = vit_recipe()
    raw["model"] |= {"source": f"py:{tmp_path / 'own.py'}:model", "weights": "random", "args": {}}
    assert says in str(refused(raw))


def test_labels_of_a_wrong_shape(vit_recipe: Make, tmp_path: Path) -> None:
    assert "not one value" in refused(image_recipe(vit_recipe, tmp_path, numbers(4, 32, 32), np.zeros((4, 5)))).what


def test_image_files(vit_recipe: Make, tmp_path: Path) -> None:
    for index, mode in enumerate(("L", "RGB", "RGBA", "1", "L")):
        (tmp_path / f"class{index}").mkdir()
        Image.new(mode, (40, 50)).save(tmp_path / f"class{index}" / "a.png")
    source = {"source": f"images:{tmp_path}"}
    raw = vit_recipe(data={"calibration": source, "evaluation": {**source, "metric": "accuracy"}})
    sources = load(raw)
    assert sources.fixed(4)["pixel_values"].shape == (4, 1, 32, 32)
    for content in (b"", b"no image", (tmp_path / "class1" / "a.png").read_bytes()[:40]):
        (tmp_path / "class0" / "a.png").write_bytes(content)
        assert "cannot read the image" in refused(raw).what
        with pytest.raises(InputError, match=r"a\.png"):
            sources.processor.encode(Examples({"image": [tmp_path / "class0" / "a.png"]}))


def test_images_that_are_none(vit_recipe: Make) -> None:
    processor = load(vit_recipe()).processor
    for value in (5, None, np.zeros((32, 32))):
        with pytest.raises(InputError, match="cannot read the image given as a"):
            processor.encode(Examples({"image": [value]}))
