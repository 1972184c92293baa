"""Word error rate, against torchmetrics and by hand."""

from __future__ import annotations

import numpy as np
import pytest
from torchmetrics.functional.text import word_error_rate

from optin_export.errors import InputError
from optin_export.measure.transcripts import edits, error_rate, words


@pytest.mark.parametrize(
    ("text", "heard", "found"),
    [
        ("the cat sat", "the cat sat", (0, 3)),
        ("the cat sat", "", (3, 3)),
        ("", "the cat", (2, 0)),
        ("the cat sat", "a cat sat down", (2, 3)),
        ("the cat sat on the mat", "cat sat on a the mat", (2, 6)),
        ("Don't STOP, now!", "don’t stop now", (0, 3)),
        ("a b c d", "b c d a", (2, 4)),
    ],
)
def test_edits_are_the_least(text: str, heard: str, found: tuple[int, int]) -> None:
    assert edits(text, heard) == found


def test_the_rate_is_that_of_torchmetrics() -> None:
    generator = np.random.default_rng(0)
    pairs = [[" ".join(generator.choice(list("abcd"), generator.integers(1, 9))) for _ in range(2)] for _ in range(40)]
    wanted = 100 * float(word_error_rate([heard for _, heard in pairs], [text for text, _ in pairs]))
    assert error_rate(np.array([edits(*pair) for pair in pairs], float)) == pytest.approx(wanted, rel=1e-6)


def test_words_have_no_case_and_no_punctuation() -> None:
    assert words("It's 5 o'clock - isn't it? 'Yes.'") == ["it's", "5", "o'clock", "isn't", "it", "yes"]


def test_no_word_gives_no_rate() -> None:
    with pytest.raises(InputError, match="no text has a word"):
        error_rate(np.zeros((2, 2)))
