"""The whole way from Python: a recipe is run, both engines are measured in turns, and the pruned model is loaded.

What `optin_export.prune` makes in memory is exported by `to_onnx`; a run also builds engines, measures and judges them.
"""

import os
from pathlib import Path

import numpy as np
import onnxruntime
import torch

import optin_export as oe

ROOT = Path(__file__).parent.parent
out = Path(os.environ.get("OUT", "runs/examples")) / "measured"
few = ["data.calibration.samples=64", "data.evaluation.samples=100", "prune.probes=16", "gates.speedup=1"]

report = oe.run(ROOT / "recipes" / "quickstart.yaml", out=out, overrides=few)
assert report is not None
print(f"{report.macs.ratio:.1%} of the MACs; every gate passed: {report.verdict.passed}")
for found in report.latency:
    ratio = found.speedup
    print(f"batch {found.batch}: {found.base_ms.p50:.3f} ms unpruned, {found.pruned_ms.p50:.3f} ms pruned (medians)")
    print(f"  speedup {ratio.median:.2f}, 95 % interval {ratio.ci_low:.2f} to {ratio.ci_high:.2f}")

pruned = oe.load_model(out / "model")  # named tensors in, one tensor out
images = torch.randn(8, 1, 32, 32)
with torch.no_grad():
    expected = pruned(pixel_values=images).numpy()
session = onnxruntime.InferenceSession(out / "onnx" / "pruned.onnx")
(logits,) = session.run(None, {"pixel_values": images.numpy()})
np.testing.assert_allclose(logits, expected, atol=1e-4)
