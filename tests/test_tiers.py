"""The lists of tests that are left to longer suites name tests that exist."""

from __future__ import annotations

import pytest

from tests.tiers import UNUSED, too_late


def test_every_name_fits_a_test(request: pytest.FixtureRequest) -> None:
    assert request.config.stash[UNUSED] == []


def test_only_longer_suites_are_left_out_and_only_late() -> None:
    assert too_late(["parametrize", "slow"], "100", 101.0) and too_late(["triton"], "100", 101.0)
    assert not too_late(["parametrize"], "100", 101.0)
    assert not too_late(["slow"], "100", 99.0) and not too_late(["slow"], None, 101.0)
