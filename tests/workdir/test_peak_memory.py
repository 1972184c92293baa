"""Peak memory is counted from the moment it was forgotten."""

from __future__ import annotations

import numpy as np
import pytest

from optin_export.workdir.peak_memory import forget_peak, peak_bytes


def test_the_peak_is_that_since_it_was_forgotten() -> None:
    if not forget_peak():
        pytest.skip("this system cannot count a peak again")
    before = peak_bytes()
    block = np.ones(25_000_000)  # 200 MB, touched
    high = peak_bytes()
    del block
    assert before is not None and high is not None and high - before > 150e6
    forget_peak()
    after = peak_bytes()
    assert after is not None and high - after > 100e6
