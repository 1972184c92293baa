"""Every form in which rows are given in memory becomes the same columns."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from optin_export.data import given_rows
from optin_export.data.given import GivenTokens
from optin_export.data.readers import Examples
from optin_export.errors import InputError

IMAGES = torch.arange(6 * 3 * 2 * 2, dtype=torch.float32).reshape(6, 3, 2, 2)
LABELS = torch.tensor([3, 1, 4, 1, 5, 9])
CONV = nn.Conv2d(3, 4, 1)
TEXTS = ["a", "b c", "d", "e"]


class Reader(nn.Module):
    def forward(self, input_ids: Any, attention_mask: Any = None, token_type_ids: Any = None, position_ids: Any = None,
                start_positions: Any = None, labels: Any = None) -> None: ...  # fmt: skip


@pytest.mark.parametrize(
    "data",
    [
        IMAGES,
        IMAGES.numpy(),
        IMAGES.double(),
        list(IMAGES),
        IMAGES.split(4),
        DataLoader(TensorDataset(IMAGES, LABELS), batch_size=4),
        TensorDataset(IMAGES, LABELS),
        [{"pixel_values": IMAGES[:4], "labels": LABELS[:4]}, {"pixel_values": IMAGES[4:], "labels": LABELS[4:]}],
        {"x": IMAGES, "label": LABELS},
        (batch for batch in IMAGES.requires_grad_(False).split(1)),
    ],
    ids=range(10),
)
def test_images_in_any_form(data: Any) -> None:
    found = given_rows(data, "image-classification", CONV)
    assert list(found.columns) == ["pixel_values"]
    assert found.columns["pixel_values"].dtype == np.float32  # type: ignore[union-attr]
    np.testing.assert_array_equal(found.columns["pixel_values"], IMAGES)


def test_vectors_and_sequences_are_rows_by_what_the_model_is() -> None:
    """Without a convolution three dimensions are a batch of sequences."""
    linear = nn.Linear(2, 2)
    vectors = given_rows([torch.ones(2), torch.zeros(2)], "image-classification", linear)
    np.testing.assert_array_equal(vectors.columns["pixel_values"], [[1, 1], [0, 0]])
    assert len(given_rows([torch.ones(5, 3, 2)], "image-classification", linear)) == 5
    assert len(given_rows([torch.ones(5, 3, 2)], "image-classification", CONV)) == 1


@pytest.mark.parametrize(
    "data",
    [
        DataLoader(TensorDataset(IMAGES, LABELS), batch_size=4),
        TensorDataset(IMAGES, LABELS),
        [(IMAGES, LABELS)],
        [{"pixel_values": IMAGES, "labels": LABELS.tolist()}],
        [({"pixel_values": image}, int(label)) for image, label in zip(IMAGES, LABELS, strict=True)],
    ],
    ids=range(5),
)
def test_labels_are_kept_where_they_are_asked_for(data: Any) -> None:
    found = given_rows(data, "image-classification", CONV, labelled=True)
    assert list(found.columns["label"]) == LABELS.tolist() and len(found) == 6


def test_no_more_is_read_than_asked_for() -> None:
    def endless() -> Any:
        while True:
            yield IMAGES[:4]

    assert len(given_rows(endless(), "image-classification", CONV, samples=6)) == 6


@pytest.mark.parametrize(
    "data", [TEXTS, [TEXTS], [(text, 1) for text in TEXTS], [{"text": TEXTS, "label": [0] * 4}], [(TEXTS, LABELS[:4])]],
    ids=range(5),
)  # fmt: skip
def test_texts_in_any_form(data: Any) -> None:
    assert given_rows(data, "text-classification", Reader()).columns == {"text": TEXTS}


def test_pairs_words_and_questions() -> None:
    pairs = given_rows([("a", "b"), ("c", "d")], "text-classification", Reader())
    assert pairs.columns == {"text": ["a", "c"], "text_pair": ["b", "d"]}
    words = given_rows([{"tokens": ["a", "b"]}, {"tokens": [["c"], ["d"]]}], "token-classification", Reader())
    assert words.columns == {"tokens": [["a", "b"], ["c"], ["d"]]}
    asked = given_rows([{"question": "a", "context": "b", "id": 1}], "question-answering", Reader())
    assert asked.columns == {"question": ["a"], "context": ["b"]}


@pytest.mark.parametrize(
    "data",
    [
        {"input_ids": [[5, 6, 7], [8]]},
        [{"input_ids": [5, 6, 7]}, {"input_ids": [8]}],
        [torch.tensor([5, 6, 7]), torch.tensor([8])],
        {"input_ids": torch.tensor([[5, 6, 7, 0], [8, 0, 0, 0]]), "attention_mask": [[1, 1, 1, 0], [1, 0, 0, 0]],
         "token_type_ids": torch.zeros(2, 4, dtype=torch.int64), "start_positions": torch.zeros(2), "idx": 3},
    ],
    ids=range(4),
)  # fmt: skip
def test_tokens_lose_their_padding(data: Any) -> None:
    found = given_rows(data, "text-classification", Reader()).columns
    assert [row.tolist() for row in found["input_ids"]] == [[5, 6, 7], [8]]
    assert [row.tolist() for row in found["attention_mask"]] == [[1, 1, 1], [1]]
    assert found.keys() == {"input_ids", "attention_mask"}


def test_padding_before_or_within_a_row_stays() -> None:
    data = {"input_ids": [[0, 5, 6, 0]], "attention_mask": [[0, 1, 1, 0]], "token_type_ids": [[0, 0, 1, 0]]}
    found = given_rows(data, "text-classification", Reader()).columns
    assert {name: column[0].tolist() for name, column in found.items()} == {
        "input_ids": [0, 5, 6],
        "attention_mask": [0, 1, 1],
        "token_type_ids": [0, 0, 1],
    }


def test_tokens_are_padded_to_the_longest_or_to_what_ships() -> None:
    rows = {"input_ids": [np.array([5, 6, 7]), np.array([8])], "attention_mask": [np.ones(3, int), np.ones(1, int)]}
    examples = Examples(rows)
    processor = GivenTokens(sequence=5, pad=9)
    assert processor.encode(examples)["input_ids"].tolist() == [[5, 6, 7], [8, 9, 9]]
    assert processor.encode(examples, pad_to=4)["attention_mask"].tolist() == [[1, 1, 1, 0], [1, 0, 0, 0]]
    assert processor.order(examples).tolist() == [1, 0]
    full = GivenTokens(sequence=5, pad=9, mask=False, full=True).encode(examples)
    assert list(full) == ["input_ids"] and full["input_ids"].shape == (2, 5)


@pytest.mark.parametrize(
    ("data", "task", "says"),
    [
        ([IMAGES, "text"], "image-classification", "item 1 of the data is not one tensor"),
        ([IMAGES[0, 0, 0, 0]], "image-classification", r"it is float32 \[\]"),
        ([{"a": IMAGES, "b": IMAGES}], "image-classification", "a: Tensor, b: Tensor"),
        ("a text", "text-classification", "it is a str"),
        (["a", {"input_ids": [1]}], "text-classification", "item 0 has text, item 1 has input_ids"),
        ([{"sentence": "a"}], "text-classification", "neither 'input_ids' nor 'text'"),
        ([{"input_ids": [1.5]}], "text-classification", "not a list of whole numbers"),
        ([{"input_ids": [[1, 2]], "attention_mask": [[1]]}], "fill-mask", "tokens by name"),
        ([{"input_ids": [[1, 2]], "attention_mask": [[0, 0]]}], "fill-mask", "its mask has no token"),
        ([{"input_ids": [[1]], "attention_mask": [[1], [1]]}], "fill-mask", "1 rows, but 2 in 'attention_mask'"),
        ([{"input_ids": [[1]], "position_ids": [[0]]}], "fill-mask", "'position_ids', which is not read"),
        ([[" "]], "text-classification", "'text' of row 0 is empty"),
    ],
)
def test_what_is_no_row_is_refused_by_its_place(data: Any, task: str, says: str) -> None:
    module = CONV if task.startswith("image") else Reader()
    with pytest.raises(InputError, match=says):
        given_rows(data, task, module)
