"""The one comparison of outputs, by hand-made numbers; engines, servers and shadow traffic all use it."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest

from optin_export.measure.parity import differences, share_agreeing


def test_each_row_is_compared_with_its_own_scale() -> None:
    expected = np.array([[1.0, -4.0], [0.5, 0.25], [0.0, 0.0]], np.float32)
    got = np.array([[1.0, -3.0], [0.5, 0.5], [0.0, 0.0]], np.float32)
    found = differences(got, expected)
    assert found.error.tolist() == [0.25, 0.5, 0.0] and found.scale[:2].tolist() == [4.0, 0.5]
    assert found.cosine[0] == pytest.approx(13 / (10 * 17) ** 0.5) and found.cosine[2] == 1.0


def test_values_that_are_not_numbers_are_never_equal() -> None:
    assert not differences(np.array([[np.nan, 1.0]]), np.array([[1.0, 1.0]])).error[0] <= 1e9


def test_a_choice_within_the_slack_of_the_best_agrees() -> None:
    expected = np.array([[1.0, 0.9, 0.0], [1.0, 0.9, 0.0]])
    got = np.array([[0.0, 1.0, 0.0], [0.0, 0.0, 1.0]])
    assert share_agreeing(got, expected, 1, np.zeros(2)) == 0.0
    assert share_agreeing(got, expected, 1, np.full(2, 0.11)) == 0.5
    assert share_agreeing(expected, expected, 1, np.zeros(2)) == 1.0


def test_comparing_what_a_server_answers_needs_no_torch() -> None:
    code = "import sys, optin_export.serving.shadow; sys.exit(int('torch' in sys.modules or 'scipy' in sys.modules))"
    subprocess.run([sys.executable, "-c", code], check=True)
