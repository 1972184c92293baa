"""Profiles: `ci`, about 500 cases and always the same; `nightly` (OPTIN_EXPORT_FUZZ=nightly), new ones."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

from tests.fuzz import oracle
from tests.robust import forked
from tests.shortly import measure_shortly

PROFILE = os.environ.get("OPTIN_EXPORT_FUZZ", "ci")
#: Cases per target that is quick; `slower` targets get a fraction.
COUNT = {"ci": 20, "nightly": 520}
_COMMON = {"deadline": None, "database": None, "suppress_health_check": list(HealthCheck)}
settings.register_profile("ci", max_examples=COUNT["ci"], derandomize=True, **_COMMON)
settings.register_profile("nightly", max_examples=COUNT["nightly"], print_blob=True, **_COMMON)


@pytest.fixture(autouse=True)
def counted(record_property: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    before = sum(oracle.CASES.values())
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    yield
    record_property("fuzz_cases", sum(oracle.CASES.values()) - before)  # type: ignore[operator]


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of a tiny model, for onnxruntime and torch."""
    import optin_export

    place = tmp_path_factory.mktemp("finished")
    recipe = forked.write_recipe(place, targets=[{"engine": "onnxruntime"}, {"engine": "torch"}], ship={})
    patch = pytest.MonkeyPatch()
    measure_shortly(patch.setattr)
    report = optin_export.run(recipe, place / "run")
    patch.undo()
    assert report is not None and report.verdict.passed, json.dumps(report and report.verdict.summary)
    return place / "run"


settings.load_profile(PROFILE)
