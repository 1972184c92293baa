"""tools/studies/held_out.py: which held-out rows choose, which report, and which were seen in training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.test_docs import load_tool

tool = load_tool("held_out")

WORDS = ["quick", "brown", "fox", "jumps", "over", "lazy", "dog", "while", "seven", "wizards", "brew", "strange", "tea"]


def texts(count: int) -> list[str]:
    generator = np.random.default_rng(0)
    return [" ".join(generator.choice(WORDS, 6)) for _ in range(count)]


def half_by_row(columns: dict[str, Any], known: list[str] | None = None) -> list[str]:
    parts = tool.parts(columns, known or [])
    halves = {int(row): half for half in ("choose", "report") for row in parts[half]}
    return [halves[row] for row in range(len(next(iter(columns.values()))))]


@pytest.mark.parametrize("kind", ["text", "image"])
def test_halves_are_disjoint_exhaustive_and_about_equal(kind: str) -> None:
    images = np.random.default_rng(0).integers(0, 256, (400, 4, 4, 3), dtype=np.uint8)
    parts = tool.parts({"text": texts(400)} if kind == "text" else {"image": images, "label": np.zeros(400)})
    assert sorted([*parts["choose"], *parts["report"]]) == list(range(400))
    assert 150 < len(parts["choose"]) < 250 and set(parts) == {"choose", "report"}


def test_a_row_keeps_its_half_wherever_it_stands_and_whatever_its_label() -> None:
    images = np.random.default_rng(0).integers(0, 256, (60, 4, 4), dtype=np.uint8)
    order = np.random.default_rng(1).permutation(60)
    halves = half_by_row({"image": images, "label": np.zeros(60)})
    assert [halves[row] for row in order] == half_by_row({"image": images[order], "label": np.ones(60)})
    rows = texts(60)
    halves = half_by_row({"text": rows})
    assert [halves[row] for row in order] == half_by_row({"text": [rows[row] for row in order]})
    assert halves[:7] == half_by_row({"text": rows[:7]})


def test_images_in_files_go_by_their_content(tmp_path: Path) -> None:
    paths = []
    for number in range(20):
        paths.append(tmp_path / f"{number}.jpg")
        paths[-1].write_bytes(bytes([number % 10]))
    halves = half_by_row({"image": paths})
    assert halves[:10] == halves[10:] and len(set(halves)) == 2


def test_duplicates_stay_together_whatever_their_case_spaces_and_punctuation() -> None:
    rows = texts(40)
    again = [f"  {row.upper().replace(' ', '  ')} !" for row in rows]
    halves = half_by_row({"text": [*rows, *again]})
    assert halves[:40] == halves[40:] and len(set(halves)) == 2


def test_pairs_that_share_a_sentence_stay_together() -> None:
    rows = texts(90)
    # 0-1, 2-1, 2-3: one group of three pairs; as often as there are texts for it
    first = [rows[at] for start in range(0, 88, 4) for at in (start, start + 2, start + 2)]
    second = [rows[at] for start in range(0, 88, 4) for at in (start + 1, start + 1, start + 3)]
    halves = half_by_row({"text": first, "text_pair": second})
    assert all(len(set(halves[start : start + 3])) == 1 for start in range(0, len(halves), 3))
    assert len(set(halves)) == 2
    turned = half_by_row({"text": second, "text_pair": first})
    assert turned == halves


def test_phrases_of_one_sentence_stay_together_by_the_sentences_that_are_known() -> None:
    known, rows = [], []
    for number in range(40):
        known.append(f"number {number} is a film that nobody will forget before winter{number} comes .")
        rows += [f"number {number} is a film", f"before winter{number}", f"Winter{number} comes", "film"]
    groups = tool.groups({"text": rows}, known)
    halves = half_by_row({"text": rows}, known)
    for start in range(0, len(rows), 4):
        assert len(set(groups[start : start + 3])) == 1  # neither phrase holds another
        assert len(set(halves[start : start + 3])) == 1
    assert len(set(halves)) == 2
    assert len(set(groups[3::4])) == 1  # a word of forty sentences does not join them
    assert len(set(groups)) == 41
    assert len(set(tool.groups({"text": rows}))) == 121  # without the sentences nothing says so


def test_clean_rows_are_those_that_are_no_part_of_a_training_text() -> None:
    known = ["The film , well-made and quick , is a joy .", "so bad", "!"]
    planted = {
        "the film": True,
        "WELL MADE and   quick": True,  # case, spaces, punctuation
        "so bad": True,  # all of it
        "joy so": False,  # across two texts
        "a jo": False,  # half a word
        "the film is a joy": False,  # words in between
        "I say it is so bad that it is a joy": False,  # holds one, is no part of it
        "...": True,  # no word to tell by
    }
    assert dict(zip(planted, tool.parts_of(list(planted), known).tolist(), strict=True)) == planted
    parts = tool.parts({"text": list(planted)}, known)
    assert [list(planted)[row] for row in parts["clean"]] == [text for text, seen in planted.items() if not seen]
    assert set(parts["clean_report"]) == set(parts["clean"]) & set(parts["report"])


def test_facts_count_the_parts_of_all_rows() -> None:
    known = ["The film is a joy .", "is a dull joy"]
    found = tool.facts({"text": ["a joy", "THE FILM", "it is a dull joy", "winter"], "label": [0, 1, 0, 1]}, known)
    assert found["training_texts"] == {"parts_of_training_texts": 2, "holding_one": 1}
    assert found["held_out_rows"] == 4 and found["parts"]["choose"] + found["parts"]["report"] == 4
    assert found["parts"]["clean"] == 2 >= found["parts"]["clean_report"]
    assert "training_texts" not in tool.facts({"text": ["a joy"]})


def test_clean_sentences_that_hold_a_training_text_are_counted() -> None:
    known = ["is a joy", "so bad"]
    rows = ["it is a joy to see", "it is so bad", "is a dull joy", "Is, a: JOY"]
    assert tool.holding(rows, known).tolist() == [True, False, False, True]


def test_a_study_sees_the_rows_that_choose_only() -> None:
    base = np.array([[1.0, 1.0]] * 10)
    base[9, 0] = 0.0
    pruned = base.copy()
    pruned[:4, 0] = 0.0  # four more rows are wrong now, one of them may choose
    found = tool.judged(base, pruned, "accuracy", np.array([3, 5, 6, 7]))
    assert found == {"half": "choose", "base": 100.0, "accuracy": 75.0, "drop": 25.0}
