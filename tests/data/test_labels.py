"""Labels become the model's classes by one mechanism, or are refused with the rows at fault."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import timm
from PIL import Image

from optin_export.data.fitness import check_amounts, check_metric, check_training
from optin_export.data.labels import Classes, class_indices, numbers, word_indices
from optin_export.data.readers import Examples, load_examples
from optin_export.errors import InputError
from optin_export.models.class_names import AmbiguousName, ClassNames, names_of, repaired_config
from optin_export.recipe import DataSource

SENTIMENT = ("negative", "positive")
STARS = ("1 star", "2 stars", "3 stars", "4 stars", "5 stars")


def indices(labels: Any, names: tuple[str, ...] = (), count: int | None = None, **rest: Any) -> list[int]:
    examples = Examples({"label": labels}, **rest)
    return class_indices(examples, Classes(count or len(names), ClassNames(names)))[0].tolist()


def notes(labels: Any, names: tuple[str, ...], count: int | None = None, **rest: Any) -> str:
    found = class_indices(Examples({"label": labels}, **rest), Classes(count or len(names), ClassNames(names)))[1]
    return " | ".join(found)


def refusal(labels: Any, names: tuple[str, ...] = (), count: int | None = None, **rest: Any) -> str:
    with pytest.raises(InputError) as caught:
        indices(labels, names, count, **rest)
    assert str(caught.value).count("\n") == 2
    return str(caught.value)


# --- values ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("labels", "names", "expected"),
    [
        (["positive", "negative"], SENTIMENT, [1, 0]),
        (["POSITIVE", " negative "], SENTIMENT, [1, 0]),
        (["not toxic", "very_toxic"], ("not_toxic", "very-toxic"), [0, 1]),
        (["1", "0"], SENTIMENT, [1, 0]),
        ([1.0, 0.0], SENTIMENT, [1, 0]),
        (["1.0", "positive"], SENTIMENT, [1, 1]),
        (np.array([1, 0]), SENTIMENT, [1, 0]),
        (np.array([[1], [0]]), SENTIMENT, [1, 0]),
        (["1", "3"], ("1", "2", "3"), [0, 2]),
        ([1, 3.0], ("1", "2", "3"), [0, 2]),
        ([0, 4, "4.0"], ("0", "4"), [0, 1, 1]),
        ([-1, 1], ("-1", "1"), [0, 1]),
        (["LABEL_1", "LABEL_0"], ("LABEL_0", "LABEL_1"), [1, 0]),
        ([True, False], SENTIMENT, [1, 0]),
        (["True", "false"], SENTIMENT, [1, 0]),
        ([True, False], ("true", "false"), [0, 1]),
        (["1 star", "5 stars"], STARS, [0, 4]),
        ([0, 4, 2], STARS, [0, 4, 2]),
        (["tench", "Tinca tinca"], ("tench, Tinca tinca", "goldfish"), [0, 0]),
        ([b"positive"], SENTIMENT, [1]),
    ],
)
def test_names_then_indices(labels: Any, names: tuple[str, ...], expected: list[int]) -> None:
    assert indices(labels, names) == expected


@pytest.mark.parametrize(
    ("labels", "names", "count", "says"),
    [
        ([1, 2, 3], (), 3, "subtract one"),
        ([1, 5, 3], STARS, 5, "labels run from 1 to 5; the model has 5 classes, 0 to 4: '1 star'"),
        ([1, 2, 4], STARS, 5, "could be indices or parts of names"),
        ([-1, 1], (), 2, "write 0 for -1"),
        ([0, 1, 7], (), 3, "label 7 of row 2"),
        ([0, 0.5], (), 2, "not a whole number"),
        ([0, 2], ("1", "2"), 2, "class names are numbers"),
        (["good", "positive"], SENTIMENT, 2, "label 'good' of row 0"),
        (["a", "a", "b"], (), 2, "nor are 2 more (row 1, row 2)"),
        ([[0, 1], [1, 0]], (), 2, "one-hot"),
        (np.eye(3), (), 3, "one-hot"),
        (["True", "False", "True"], (), 3, "label 'True'"),
        (["crane"], ("crane", "crane"), 2, "several classes"),
        ([float("inf")], (), 2, "label 'inf'"),
    ],
)
def test_labels_that_are_no_class(labels: Any, names: tuple[str, ...], count: int, says: str) -> None:
    assert says in refusal(labels, names, count)


def test_the_rows_at_fault_are_named_as_the_user_finds_them(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("text,label\nred,0\n\nblue,3\n")
    examples = load_examples(DataSource.model_validate({"source": f"csv:{tmp_path}/a.csv"}), ("text", "label"), 0)
    with pytest.raises(InputError, match="label 3 of line 4"):
        class_indices(examples, Classes(2, ClassNames()))
    drawn = Examples({"label": [0, 0, 0, 9]}, places=np.arange(4)).take([1, 3])
    with pytest.raises(InputError, match="label 9 of row 3"):
        class_indices(drawn, Classes(2, ClassNames()))


def test_what_was_decided_is_said() -> None:
    assert "true and false" in notes(["True", "False"], SENTIMENT)
    assert notes(["positive"], SENTIMENT) == ""


def test_amounts() -> None:
    assert numbers(Examples({"label": ["0.5", 3]})).tolist() == [0.5, 3.0]
    for bad in ("good", "nan", float("inf"), None):
        with pytest.raises(InputError, match="row 1 is not a number"):
            numbers(Examples({"label": [1, bad]}))
    with pytest.raises(InputError, match="not one value"):
        numbers(Examples({"label": [[1, 2]]}))


def test_labels_of_words() -> None:
    classes = Classes(3, ClassNames(("O", "B-PER", "I-PER")))
    examples = Examples({"tokens": [["a", "b"], ["c"]], "label": ["O b-per", [-100]]})
    assert [row.tolist() for row in word_indices(examples, classes)[0]] == [[0, 1], [-100]]
    for label, says in (
        ([[0, 1.5]], "label 1.5"),
        ([["O", "B-LOC"]], "label 'B-LOC'"),
        ([[-100, -100]], "no word has"),
    ):
        with pytest.raises(InputError) as caught:
            word_indices(Examples({"tokens": [["a", "b"]], "label": label}), classes)
        assert says in caught.value.what
    numbered = Classes(2, ClassNames(("1", "2")))
    assert word_indices(Examples({"tokens": [["a"]], "label": [[2]]}), numbered)[0][0].tolist() == [1]


# --- classes of the data: folders, patterns, features ----------------------------------------------------------------


def folders(labels: list[str], classes: tuple[str, ...], names: tuple[str, ...] = (), count: int = 0) -> list[int]:
    return indices(labels, names, count or len(names), classes=classes)


def test_class_folders_by_name_then_number_then_order() -> None:
    colours = ("red", "green", "blue", "grey")
    assert folders(["blue", "Green"], ("Green", "blue"), colours) == [2, 1]
    assert folders(["blue"], ("blue", "notes"), colours) == [2]  # nothing is of the class notes
    assert folders(["10", "2"], ("0", "2", "10"), count=11) == [10, 2]
    assert folders(["b", "a"], ("a", "b"), count=2) == [1, 0]
    assert "'a' is 0, 'b' is 1" in notes(["b", "a"], (), 2, classes=("a", "b"))
    assert "red" in notes(["b", "a"], ("red", "green"), classes=("a", "b"))
    assert folders(["c2", "c10"], ("c2", "c10"), count=2) == [0, 1]
    assert "sorts them as text (c10, c2" in notes(["c2", "c10"], (), 2, classes=("c2", "c10"))
    assert folders(["b"], ("a", "b", "c"), count=3) == [1]  # an empty folder counts, as ImageFolder has it
    assert folders(["b", "c"], ("a", "b", "c"), count=2) == [0, 1]  # but only where that gives all classes


@pytest.mark.parametrize(
    ("labels", "classes", "names", "count", "says"),
    [
        (["red", "pink"], ("pink", "red"), ("red", "green", "blue"), 3, "not classes of the model: 'pink'"),
        (["a", "b"], ("a", "b"), ("red", "green", "blue"), 3, "the numbers differ"),
        (["a", "b"], ("a", "b"), (), 3, "the numbers differ"),
        (["3", "4"], ("3", "4"), (), 3, "the numbers differ"),
        (["train", "val"], ("train", "val"), (), 2, "parts of a data set"),
        (["1", "5"], ("1", "5"), ("1", "2"), 2, "'5'"),
    ],
)  # fmt: skip
def test_class_folders_that_cannot_be_told(
    labels: list[str], classes: tuple[str, ...], names: tuple[str, ...], count: int, says: str
) -> None:
    assert says in refusal(labels, names, count, classes=classes)


def picture(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 8)).save(path)


def test_what_lies_in_a_folder_of_classes(tmp_path: Path) -> None:
    for name in ("cat/1.png", "cat/deep/2.png", "dog/1.png", "._dog/x.png", ".ipynb_checkpoints/1.png"):
        picture(tmp_path / "photos" / name)
    picture(tmp_path / "photos" / "cat" / "._1.png")
    picture(tmp_path / "photos" / "__MACOSX" / "cat" / "1.png")
    picture(tmp_path / "elsewhere" / "3.png")
    (tmp_path / "photos" / "empty").mkdir()
    (tmp_path / "photos" / "Thumbs.db").write_bytes(b"")
    (tmp_path / "photos" / "bird").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "photos" / "cat" / "loop").symlink_to(tmp_path / "photos")
    section = DataSource.model_validate({"source": f"images:{tmp_path / 'photos'}"})
    examples = load_examples(section, ("image", "label"), 0)
    assert examples.columns["label"] == ["bird", "cat", "cat", "dog"]
    assert examples.classes == ("bird", "cat", "dog", "empty")
    assert examples.where(0).endswith("photos/bird/3.png")
    assert examples.digest() != Examples(examples.columns, classes=("bird", "cat", "dog")).digest()


# --- names ----------------------------------------------------------------------------------------------------------


def config(id2label: Any = None, label2id: Any = None) -> Any:
    return SimpleNamespace(config=SimpleNamespace(id2label=id2label, label2id=label2id))


def test_names_of_a_configuration() -> None:
    generic = {0: "LABEL_0", 1: "LABEL_1"}
    back = {"LABEL_0": 0, "LABEL_1": 1}
    real, inverse = dict(enumerate(SENTIMENT)), {"negative": 0, "positive": 1}
    for module in (config(real), config(real, back), config(real, inverse), config(generic, inverse)):
        found = names_of(module, {}, 2)
        assert found.names == SENTIMENT and not found.notes and found.find("Positive") == 1
    assert names_of(config(generic, inverse), {}, 2).find("LABEL_1") == 1  # what the pipeline says
    assert not names_of(config(generic, back), {}, 2).real
    twisted = names_of(config(real, {"negative": 1, "positive": 0}), {}, 2)
    assert twisted.names == SENTIMENT and "contradict" in twisted.notes[0]
    assert twisted.notes[0] in class_indices(Examples({"label": ["positive"]}), Classes(2, twisted))[1]
    assert names_of(config(), {"cat": 1, "dog": 0}, 2).names == ("dog", "cat")
    assert names_of(SimpleNamespace(), {}, 2) == ClassNames()  # type: ignore[arg-type]
    assert repaired_config({"label2id": {"b": 1, "a": 0}})["id2label"] == {1: "b", 0: "a"}
    assert repaired_config({"label2id": {"a": 0}, "id2label": {"0": "a"}}) == {}
    assert repaired_config({"label2id": {"a": 0, "b": 2}}) == {}


def test_names_that_several_classes_have() -> None:
    names = ClassNames(("crane", "Cardigan, Welsh corgi", "cardigan", "crane"))
    assert names.find("cardigan") == 2 and names.find("Welsh corgi") == 1
    with pytest.raises(AmbiguousName, match="0, 3"):
        names.find("Crane")


def test_imagenet_by_wordnets_numbers() -> None:
    """timm's own list, for its models and for those of transformers whose classes are ImageNet's."""
    info = timm.data.ImageNetInfo()
    model = timm.create_model("test_vit", pretrained=False)
    found = names_of(model, {}, 1000)
    assert [found.find(info.index_to_label_name(index)) for index in (0, 1, 999)] == [0, 1, 999]
    assert found.names[0] == info.index_to_description(0) == "tench, Tinca tinca"
    own = dict(enumerate(info.label_descriptions()))
    assert names_of(config(own, {}), {}, 1000).find("n01440764") == 0
    other = {index: f"thing {index}" for index in range(1000)}
    assert names_of(config(other, {}), {}, 1000).find("n01440764") is None
    assert names_of(timm.create_model("test_vit", pretrained=False, num_classes=5), {}, 5) == ClassNames()
    model.pretrained_cfg = {"label_names": ["n1", "n2"], "label_descriptions": {"n1": "cat", "n2": "dog"}}
    assert names_of(model, {}, 2).names == ("cat", "dog") and names_of(model, {}, 2).find("n2") == 1


# --- metrics --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("metric", "task", "outputs", "regression", "problem", "says"),
    [
        ("accuracy", "text-classification", 1, True, None, "one number"),
        ("f1", "text-classification", 1, True, None, "one number"),
        ("accuracy", "image-classification", 1, False, None, "one number"),
        ("accuracy", "text-classification", 3, False, "multi_label_classification", "yes or no"),
        ("f1", "text-classification", 3, False, "regression", "numbers, not classes"),
        ("spearman", "text-classification", 3, False, None, "one per class"),
        ("pearson", "text-classification", 2, False, "single_label_classification", "one per class"),
        ("accuracy", "text-classification", 3, False, "single_label_classification", None),
        ("spearman", "text-classification", 1, True, None, None),
        ("spearman", "feature-extraction", 32, False, None, None),
        ("f1", "token-classification", 3, False, None, None),
    ],
)
def test_metrics_that_a_model_has_no_value_of(
    metric: str, task: str, outputs: int, regression: bool, problem: str | None, says: str | None
) -> None:
    if says is None:
        check_metric(metric, task, outputs, regression, problem)
        return
    with pytest.raises(InputError) as caught:
        check_metric(metric, task, outputs, regression, problem)
    assert says in caught.value.why


def test_training_and_constant_labels() -> None:
    check_training(3, False, None)
    check_training(1, True, "regression")
    for outputs, problem in ((3, "multi_label_classification"), (2, "regression"), (1, None)):
        with pytest.raises(InputError, match="cannot train"):
            check_training(outputs, False, problem)
    check_amounts("spearman", np.array([1.0, 2.0]))
    for labels in (np.array([1.0, 1.0]), np.array([1.0])):
        with pytest.raises(InputError, match="not defined for this data"):
            check_amounts("spearman", labels)
