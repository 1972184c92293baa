"""The suite's own ground: tests that share what is slow to make, or a machine's processes, run in one worker."""

from __future__ import annotations

import os

import pytest


@pytest.mark.skipif("PYTEST_XDIST_WORKER" not in os.environ, reason="one process has one group")
def test_groups_of_tests_reach_the_workers(request: pytest.FixtureRequest) -> None:
    """pytest-xdist hands out what follows the @; a pytest too new for it drops that silently."""
    assert request.node.nodeid.endswith("@test_groups.py-")
