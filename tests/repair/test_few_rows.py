"""Few rows of a wide layer are kept themselves: the same solutions as from their sums, in memory that fits."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from optin_export.repair import few_rows, least_squares
from optin_export.repair.curves import _refitted, _rescaled
from optin_export.repair.least_squares import Fit, Moments, rescale, ridge

FEATURES, OUTPUTS, WIDTH = 48, 5, 4


def _moments(rows: int, seed: int, outputs: int = OUTPUTS) -> Moments:
    """Of batches of weighted rows; their targets are linear in the inputs, and noise."""
    generator = torch.Generator().manual_seed(seed)
    true = torch.randn(FEATURES, OUTPUTS, generator=torch.Generator().manual_seed(9), dtype=torch.float64)[:, :outputs]
    found = Moments(FEATURES, outputs)
    for part in (rows // 2, rows - rows // 2):
        design = torch.randn(part, FEATURES, generator=generator, dtype=torch.float64)
        noise = 0.1 * torch.randn(part, outputs, generator=generator, dtype=torch.float64)
        found.add(design, design @ true + 1 + noise, torch.rand(part, generator=generator, dtype=torch.float64) + 0.1)
    return found


def _start() -> torch.Tensor:
    return torch.randn(FEATURES + 1, OUTPUTS, dtype=torch.float64, generator=torch.Generator().manual_seed(3))


@pytest.fixture
def both(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[], torch.Tensor]], list[torch.Tensor]]:
    """What a function returns with sums and with rows."""

    def run(function: Callable[[], torch.Tensor]) -> list[torch.Tensor]:
        results = []
        for wide in (FEATURES + 1, FEATURES):
            monkeypatch.setattr(least_squares, "WIDE", wide)
            results.append(function())
        return results

    return run


@pytest.mark.parametrize("fit", [ridge, lambda *given: rescale(*given, WIDTH)])
@pytest.mark.parametrize(("train", "held"), [(10, 4), (30, 4), (30, 20)])
def test_fits_are_those_of_sums(
    fit: Callable[[Moments, Moments, torch.Tensor], Fit],
    train: int,
    held: int,
    both: Callable[[Callable[[], torch.Tensor]], list[torch.Tensor]],
) -> None:
    """Also where one of the two has more rows than are kept (a quarter of the inputs)."""

    def found() -> torch.Tensor:
        one = fit(_moments(train, 0), _moments(held, 1), _start())
        assert one.damping is not None, one.fallback
        numbers = torch.tensor([one.damping, one.before, one.after], dtype=torch.float64)
        return torch.cat([one.solution.flatten(), numbers])

    torch.testing.assert_close(*both(found), rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize(
    "repaired", [_refitted, lambda *given: [_rescaled(*given[:2], one, WIDTH) for one in given[2]]]
)
def test_curves_are_those_of_sums(
    repaired: Callable[..., list[torch.Tensor]], both: Callable[[Callable[[], torch.Tensor]], list[torch.Tensor]]
) -> None:
    order = torch.randperm(FEATURES // WIDTH, generator=torch.Generator().manual_seed(5))
    units = (order[:, None] * WIDTH + torch.arange(WIDTH)).flatten()
    columns = [units[:0], units[: 2 * WIDTH], units[: 7 * WIDTH], units]

    def found() -> torch.Tensor:
        return torch.stack(list(repaired(_start(), _moments(10, 0, outputs=0), columns)))

    torch.testing.assert_close(*both(found), rtol=1e-7, atol=1e-9)


def test_only_few_rows_are_kept_and_only_of_wide_layers() -> None:
    assert Moments(few_rows.WIDE - 1, 1).few is None
    sums = Moments(few_rows.WIDE, 1)
    sums.add(torch.randn(few_rows.WIDE // 4, few_rows.WIDE), torch.randn(few_rows.WIDE // 4, 1))
    assert sums.few is not None
    assert sums.gram.numel() == 0
    sums.add(torch.randn(1, few_rows.WIDE), torch.randn(1, 1))
    assert sums.few is None
    assert sums.gram.shape == (few_rows.WIDE + 1, few_rows.WIDE + 1)


def test_other_targets_of_the_same_rows(
    both: Callable[[Callable[[], torch.Tensor]], list[torch.Tensor]],
) -> None:
    """A second round adds the same rows with other targets."""

    def found() -> torch.Tensor:
        sums = _moments(10, 0)
        generator = torch.Generator().manual_seed(0)
        again = sums.again()
        for _ in range(2):
            design = torch.randn(5, FEATURES, generator=generator, dtype=torch.float64)
            torch.randn(5, OUTPUTS, generator=generator, dtype=torch.float64)
            again.add(
                design, design[:, :OUTPUTS].clone(), torch.rand(5, generator=generator, dtype=torch.float64) + 0.1
            )
        return ridge(again, Moments(FEATURES, OUTPUTS), _start()).solution

    torch.testing.assert_close(*both(found), rtol=1e-7, atol=1e-9)
