"""Calls on bound buffers and their clocks: the same code on the CPU (here) and on a GPU (marker gpu)."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from optin_export.engines import MODES, _device
from optin_export.engines._device import Launch, Tensors

X = {"x": np.random.default_rng(0).standard_normal((64, 1024)).astype(np.float32)}


class Noted(_device.Host):
    """The CPU with a cache, and a note of every call."""

    cache_bytes = 3 * X["x"].nbytes // 2  # type: ignore[assignment]

    def __init__(self) -> None:
        super().__init__()
        self.bound: list[Tensors] = []
        self.launched: list[int] = []

    def bind(self, held: Tensors, graph: bool) -> Launch:
        self.bound.append(held)

        def launch() -> Tensors:
            self.launched.append(held["x"].data_ptr())
            return {"y": 2 * held["x"]}

        return self.captured(launch) if graph else launch


def test_a_call_from_and_to_the_host() -> None:
    device = Noted()
    outputs = _device.run(device.bind, X, device)
    assert np.array_equal(outputs["y"], 2 * X["x"])
    assert device.bound[0]["x"].data_ptr() != torch.from_numpy(X["x"]).data_ptr()


def test_inputs_are_rotated_beyond_the_cache() -> None:
    device = Noted()
    once = _device.timer(device.bind, X, "device", device)
    assert all(once() > 0.0 for _ in range(6))
    assert len(device.bound) == 3 and len(set(device.launched)) == 3
    assert device.launched[:3] == device.launched[3:]
    assert _device.sets_of(X, 0) == 1 and _device.sets_of({"x": np.ones(1)}, 50 << 20) == _device.MOST_SETS


def test_copies_are_part_of_a_call_and_of_nothing_else() -> None:
    for mode, seen in (("call", 1.0), ("device", 5.0)):
        device = Noted()
        once = _device.timer(device.bind, X, mode, device)
        for held in device.bound:
            held["x"].fill_(5.0)
        once()
        held = device.bound[0]["x"]
        assert (float(held[0, 0]) == 5.0) == (seen == 5.0)
        assert (mode == "call") == np.array_equal(held.numpy(), X["x"])


def test_the_host_has_no_graphs_to_capture() -> None:
    device = Noted()
    with pytest.raises(ValueError, match="needs a GPU"):
        _device.timer(device.bind, X, "device+graph", device)


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_without_a_gpu_there_is_a_reason() -> None:
    assert _device.gpu_name() is None and "no NVIDIA GPU" in (_device.no_gpu() or "")


@pytest.mark.gpu
@pytest.mark.parametrize("mode", list(MODES))
def test_every_mode_times_and_computes_on_a_gpu(mode: str) -> None:
    if not torch.cuda.is_available():
        pytest.skip("no NVIDIA GPU")
    device = _device.Gpu()
    assert device.cache_bytes > 0
    results: dict[int, Any] = {}

    def bind(held: Tensors, graph: bool) -> Launch:
        def launch() -> Tensors:
            results[held["x"].data_ptr()] = held["x"] @ held["x"].T
            return {"y": results[held["x"].data_ptr()]}

        return device.captured(launch) if graph else launch

    once = _device.timer(bind, X, mode, device)
    assert all(0.0 < once() < 1000.0 for _ in range(40))
    for result in results.values():
        np.testing.assert_allclose(result.cpu().numpy(), X["x"] @ X["x"].T, rtol=1e-3, atol=1e-3)
    np.testing.assert_allclose(_device.run(bind, X, device)["y"], X["x"] @ X["x"].T, rtol=1e-3, atol=1e-3)
