"""Text tasks with a label per token: how rows are encoded, what their targets are, and which data is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from optin_export.data import Examples, Sources, load_sources
from optin_export.data.text import MaskedProcessor, WordProcessor
from optin_export.errors import InputError
from optin_export.models import IGNORED
from optin_export.recipe import validate
from tests.conftest import sentences
from tests.textmodels import NAMES, TASKS, byte_pairs, recipe_for, save_small, spoken


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folders = {}
    for task, (class_name, config, _, _) in TASKS.items():
        folders[task] = save_small(tmp_path_factory.mktemp(task), class_name, **config)
    return folders


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return spoken(tmp_path_factory.mktemp("rows"))


def load(task: str, models: dict[str, Path], rows: Path, **sections: Any) -> Sources:
    return load_sources(validate(recipe_for(task, models[task], rows, **sections), Path("/")))


def load_data(task: str, models: dict[str, Path], folder: Path, data: dict[str, Any]) -> Sources:
    file = folder / "given.py"
    file.write_text(f"def rows(): return {data!r}", encoding="utf-8")
    source = {"source": f"py:{file}:rows"}
    metric = TASKS[task][3][0]
    sections = {"data": {"calibration": source, "evaluation": {**source, "metric": metric}}}
    return load(task, models, file, **sections)


def refused(task: str, models: dict[str, Path], folder: Path, data: dict[str, Any]) -> InputError:
    with pytest.raises(InputError) as caught:
        load_data(task, models, folder, data)
    assert str(caught.value).count("\n") == 2
    return caught.value


@pytest.mark.parametrize(
    ("task", "layout", "shape"),
    [
        ("token-classification", "tokens", (2, 24, 3)),
        ("question-answering", "spans", (2, 2, 24)),
        ("fill-mask", "tokens", (2, 24, 26)),
        ("text-generation", "tokens", (2, 24, None)),
    ],
)
def test_outputs(task: str, layout: str, shape: tuple[int, ...], models: dict[str, Path], rows: Path) -> None:
    sources = load(task, models, rows)
    output = sources.model(**sources.fixed(2))
    assert sources.model.output_layout == layout and sources.model.output_kind == "logits"
    vocabulary = sources.model.model.config.vocab_size  # type: ignore[union-attr]
    assert output.shape == tuple(vocabulary if size in (None, 26) else size for size in shape)


def test_every_batch_brings_a_target_per_token(models: dict[str, Path], rows: Path) -> None:
    for task in ("token-classification", "fill-mask", "text-generation"):
        data = load(task, models, rows).evaluation()
        assert data is not None and len(data.sides) == 1
        for batch in data.sides[0]:
            mask = batch.inputs["attention_mask"].numpy()
            assert batch.targets is not None and len(batch.targets) == len(mask)
            for target, real in zip(batch.targets, mask, strict=True):
                asked = np.flatnonzero(np.asarray(target) != IGNORED)
                assert len(asked) and real[asked].all()


# --- token-classification -------------------------------------------------------------------------------------------


def test_the_first_token_of_a_word_bears_its_label(models: dict[str, Path], tmp_path: Path) -> None:
    words = [["a", "guitar", "is", "red"], ["two", "dogs"]]
    data = {"tokens": [" ".join(words[0]), words[1]], "label": ["O B-THING I-THING O", [2, IGNORED]]}
    sources = load_data("token-classification", models, tmp_path, data)
    dataset = sources.evaluation()
    assert dataset is not None
    found = {int(row): batch.targets[i] for batch in dataset.sides[0] for i, row in enumerate(batch.rows)}  # type: ignore[index]
    # [CLS] a gui ##tar is red [SEP]
    assert found[0].tolist() == [IGNORED, 0, 1, IGNORED, 2, 0, IGNORED]
    assert found[1].tolist() == [IGNORED, 2, IGNORED, IGNORED]


def test_words_are_told_apart_by_blanks_for_byte_level_tokenizers(tmp_path: Path) -> None:
    """As in running text: "dogs" in the middle of a sentence is another token than at the start of a word without."""
    byte_pairs(tmp_path)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path, add_prefix_space=True)
    examples = Examples({"tokens": [["two", "dogs"]], "label": [[1, 2]]})
    processor = WordProcessor(tokenizer, 16, False)
    tokenizer.pad_token = tokenizer.eos_token
    ids = processor.encode(examples)["input_ids"][0].tolist()
    assert ids == transformers.AutoTokenizer.from_pretrained(tmp_path)(" two dogs")["input_ids"]


def test_the_recipe_asks_the_tokenizer_for_blanks(models: dict[str, Path], rows: Path, tmp_path: Path) -> None:
    folder = tmp_path / "bpe"
    folder.mkdir()
    vocabulary = byte_pairs(folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, pad_token="<|endoftext|>")
    tokenizer.save_pretrained(folder)
    config = {**TASKS["token-classification"][1], "vocab_size": vocabulary + 1}
    roberta = transformers.RobertaConfig(
        hidden_size=32, num_hidden_layers=1, num_attention_heads=4, max_position_embeddings=64, **config
    )
    transformers.RobertaForTokenClassification(roberta).save_pretrained(folder)
    sources = load("token-classification", {**models, "token-classification": folder}, rows)
    words = sources.calibration_examples.columns["tokens"][0]
    expected = transformers.AutoTokenizer.from_pretrained(folder)(" " + " ".join(words))["input_ids"]
    assert sources.fixed(1)["input_ids"][0, : len(expected)].tolist() == expected


@pytest.mark.parametrize(
    ("label", "words"),
    [
        ([["O", "O"]], "do not fit"),
        (["O O"], "do not fit"),
        ([3], "do not fit"),
        ([["O", "B-PER", "O"]], "B-PER"),
        ([[0, 3, 0]], "label 3"),
        ([[0, -1, 0]], "label -1"),
    ],
)
def test_labels_that_do_not_fit_are_refused(
    label: list[Any], words: str, models: dict[str, Path], tmp_path: Path
) -> None:
    data = {"tokens": [["a", "red", "house"]], "label": label}
    assert words in refused("token-classification", models, tmp_path, data).what


@pytest.mark.parametrize("tokens", [[["a", 3]], [[]], [7], [[""]]])
def test_words_that_are_none_are_refused(tokens: list[Any], models: dict[str, Path], tmp_path: Path) -> None:
    error = refused("token-classification", models, tmp_path, {"tokens": tokens, "label": [[0]]})
    assert "list of words" in error.why


# --- question answering ---------------------------------------------------------------------------------------------


def test_an_answer_can_be_read_off_the_context(models: dict[str, Path], tmp_path: Path) -> None:
    data = {
        "question": ["what is red", "what is old", "what is green"],
        "context": ["the house is red", "some old guitar", "green grass"],
        "label": [{"text": ["house", "the house"], "answer_start": [4, 0]}, "guitar", ["grass"]],
    }
    sources = load_data("question-answering", models, tmp_path, data)
    dataset = sources.evaluation()
    assert dataset is not None
    assert set(dataset.sides[0][0].inputs) == {"input_ids", "attention_mask", "token_type_ids"}
    found = {int(row): batch.targets[i] for batch in dataset.sides[0] for i, row in enumerate(batch.rows)}  # type: ignore[index]
    assert found[0].answers == ("house", "the house") and found[1].answers == ("guitar",)
    texts = [found[1].context[start:end] for start, end in found[1].offsets if start >= 0]
    assert texts == ["some", "old", "gui", "tar"]  # neither the question nor the marks


def test_only_the_context_is_cut(models: dict[str, Path], tmp_path: Path) -> None:
    data = {"question": ["what is it"], "context": ["a red house " * 30], "label": ["house"]}
    sources = load_data("question-answering", models, tmp_path, data)
    ids = sources.fixed(1)["input_ids"][0]
    question = sources.processor.tokenizer("what is it")["input_ids"]  # type: ignore[attr-defined]
    assert len(ids) == 24 and ids[: len(question)].tolist() == question
    data["question"] = ["what is it " * 30]
    error = refused("question-answering", models, tmp_path, data)
    assert "export.sequence" in error.fix


@pytest.mark.parametrize("label", [[], {"text": []}, 3, [3], {"answer_start": [0]}])
def test_a_question_needs_an_answer(label: Any, models: dict[str, Path], tmp_path: Path) -> None:
    data = {"question": ["what is it"], "context": ["a red house"], "label": [label]}
    assert "no usable answer" in refused("question-answering", models, tmp_path, data).what


# --- fill-mask and text-generation ----------------------------------------------------------------------------------


def masked_and_targets(sources: Sources) -> dict[int, tuple[list[int], list[int]]]:
    data = sources.evaluation()
    assert data is not None
    found = {}
    for batch in data.sides[0]:
        assert batch.targets is not None
        for row, ids, mask, target in zip(
            batch.rows, batch.inputs["input_ids"], batch.inputs["attention_mask"], batch.targets, strict=True
        ):
            found[int(row)] = (ids[mask == 1].tolist(), list(target[: int(mask.sum())]))
    return found


def test_masks_depend_on_seed_and_text_alone(models: dict[str, Path], rows: Path) -> None:
    sources = load("fill-mask", models, rows)
    found = masked_and_targets(sources)
    tokenizer = sources.processor.tokenizer  # type: ignore[attr-defined]
    texts = sources.evaluation_examples.columns["text"]  # type: ignore[union-attr]
    for row, (ids, targets) in found.items():
        whole = tokenizer(texts[row], truncation=True, max_length=24)["input_ids"]
        hidden = [position for position, token in enumerate(ids) if token == tokenizer.mask_token_id]
        assert hidden == [position for position, target in enumerate(targets) if target != IGNORED]
        assert len(hidden) == max(1, round(0.15 * (len(whole) - 2)))
        assert [targets[p] if p in hidden else ids[p] for p in range(len(ids))] == whole
        assert not set(hidden) & {0, len(ids) - 1}
    export = {"batch": [1, 7], "sequence": 24}
    assert masked_and_targets(load("fill-mask", models, rows, export=export)) == found
    assert masked_and_targets(load("fill-mask", models, rows, seed=1)) != found


def test_a_text_of_nothing_but_unknown_words_has_no_mask(models: dict[str, Path]) -> None:
    tokenizer = transformers.AutoTokenizer.from_pretrained(models["fill-mask"])
    examples = Examples({"text": ["xyz"]})
    processor = MaskedProcessor(tokenizer, 8, False)
    inputs = processor.encode(examples)
    assert tokenizer.mask_token_id not in inputs["input_ids"]
    assert (processor.targets(examples, inputs)[0] == IGNORED).all()


def test_a_decoder_predicts_the_next_token_and_needs_no_padding_token(models: dict[str, Path], rows: Path) -> None:
    sources = load("text-generation", models, rows)
    assert transformers.AutoTokenizer.from_pretrained(models["text-generation"]).pad_token is None
    for ids, targets in masked_and_targets(sources).values():
        assert targets == [*ids[1:], IGNORED]
    # Right padding: what stands behind a text changes nothing in it.
    inputs = sources.fixed(1)
    length = int(inputs["attention_mask"].sum())
    assert length < 24 and inputs["attention_mask"][0, :length].all()
    short = {name: tensor[:, :length] for name, tensor in inputs.items()}
    torch.testing.assert_close(sources.model(**inputs)[:, :length], sources.model(**short), rtol=1e-4, atol=1e-4)


def test_fill_mask_needs_a_mask_token(models: dict[str, Path], rows: Path, tmp_path: Path) -> None:
    byte_pairs(tmp_path)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path, pad_token="<|endoftext|>")
    tokenizer.save_pretrained(tmp_path)
    model = {"source": str(models["fill-mask"]), "task": "fill-mask", "tokenizer": str(tmp_path)}
    with pytest.raises(InputError, match="cannot mask"):
        load("fill-mask", models, rows, model=model)


# --- positions ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("class_name", "longest"), [("BertModel", 64), ("RobertaModel", 62), ("MPNetModel", 62), ("DistilBertModel", 64)]
)
def test_the_longest_sequence_is_what_the_model_has_positions_for(
    class_name: str, longest: int, rows: Path, tmp_path: Path
) -> None:
    """RoBERTa's kind begins to count behind the padding token's number."""
    folder = save_small(tmp_path, class_name)
    (tmp_path / "long.py").write_text(f"def rows(): return {{'text': [{' '.join(sentences(30))!r}]}}")
    raw = recipe_for("fill-mask", folder, rows, export={"batch": [1], "sequence": longest})
    raw["model"]["task"] = "feature-extraction"
    raw["data"] = {"calibration": {"source": f"py:{tmp_path / 'long.py'}:rows"}}
    sources = load_sources(validate(raw, Path("/")))
    assert sources.fixed(1)["attention_mask"].sum() == longest
    raw["export"]["sequence"] = longest + 1
    with pytest.raises(InputError, match=f"export.sequence is {longest + 1}") as caught:
        load_sources(validate(raw, Path("/")))
    assert f"{longest} positions" in caught.value.why


def test_names_of_classes_are_those_of_the_model(models: dict[str, Path], rows: Path) -> None:
    sources = load("token-classification", models, rows)
    labels = sources.labels(sources.evaluation_examples)  # type: ignore[arg-type]
    given = sources.evaluation_examples.columns["label"]  # type: ignore[union-attr]
    assert [[NAMES[label] for label in row] for row in labels] == list(given)
