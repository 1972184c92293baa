"""report.json as it is read: what no run can have written is refused in words."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from optin_export.errors import InputError
from optin_export.measure import compare
from optin_export.report.schema import ParityResult, read_report
from tests.report.test_html import latency_result, make_report


@pytest.mark.parametrize("number", ["1e300", "-1e300", "1" + "0" * 400, "NaN", "Infinity"], ids=lambda text: text[:9])
@pytest.mark.parametrize("place", ["ci_low", "p50", "block00", "blocks"])
def test_absurd_numbers(tmp_path: Path, place: str, number: str) -> None:
    """They are finite, but what is computed from them for plots is not."""
    report = make_report(latency=[{**latency_result(1), "memory": {"base": {"block00": 7}}}])
    text = report.model_dump_json()
    (tmp_path / "report.json").write_text(text)
    assert read_report(tmp_path) == report
    before, after = text.split(f'"{place}":', 1)
    end = min(after.index(mark) for mark in ",}" if mark in after)
    (tmp_path / "report.json").write_text(f'{before}"{place}":{number}{after[end:]}')
    with pytest.raises(InputError, match="cannot read"):
        read_report(tmp_path)


def test_parity_without_a_number_can_be_read_back(tmp_path: Path) -> None:
    """An engine that answers NaN is as far from its model as a report can say."""

    class Broken:
        inputs, outputs = ("x",), ("y",)

        def run(self, inputs: Any) -> dict[str, np.ndarray]:
            return {"y": np.full((1, 2), np.nan, np.float32)}

    case = compare(Broken(), lambda inputs: np.ones((1, 2)), {}, target="t", model="base", rows="distinct")
    result = ParityResult(**case.to_json())
    assert not result.passed and ParityResult.model_validate_json(result.model_dump_json()) == result
