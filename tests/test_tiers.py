"""The lists of tests that are left to longer suites name tests that exist."""

from __future__ import annotations

import pytest

from tests.tiers import UNUSED


def test_every_name_fits_a_test(request: pytest.FixtureRequest) -> None:
    assert request.config.stash[UNUSED] == []
