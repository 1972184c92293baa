"""An encoder of transformers: pruned, exported to ONNX, and both engines measured in turns by the same clock.

Random weights of a small BERT, so that nothing is downloaded; `AutoModel.from_pretrained(...)` in their place.
"""

import os
from functools import partial
from pathlib import Path

import numpy as np
import torch
import transformers

from optin_export.data import Batch
from optin_export.engines import build, load
from optin_export.export import export_onnx
from optin_export.measure import measure_latency
from optin_export.models import wrap
from optin_export.recipe import Budget, PruneSection, Target
from optin_export.repair import apply_plan
from optin_export.scoring import score
from optin_export.search import find_plan
from optin_export.units import find_structure, measure_costs

out = Path(os.environ.get("OUT", "runs/examples")) / "bert"
torch.manual_seed(0)
config = transformers.BertConfig(hidden_size=128, num_hidden_layers=2, num_attention_heads=4, intermediate_size=512)
model = wrap(transformers.BertModel(config), "feature-extraction", pooling="mean", normalize=True)


def rows(count: int) -> dict[str, torch.Tensor]:
    return {
        "input_ids": torch.randint(1000, 30000, (count, 64)),
        "attention_mask": torch.ones(count, 64, dtype=torch.long),
    }


calibration = [Batch(rows(16), np.arange(16)) for _ in range(2)]
structure = find_structure(model)
settings = PruneSection(budget=Budget(macs=0.5), probes=16)
scores = score(model, structure, calibration, settings, seed=0)
steps = {group.key: group.step(8) for group in structure.groups}
plan = find_plan(scores.values, measure_costs(model, structure, rows(1)), settings.budget, steps)
smaller = apply_plan(model, structure, plan, calibration, rows(2), repair=True).dense

target, engines, inputs = Target(engine="onnxruntime", device="cpu", threads=1), {}, rows(8)
for name, made in (("base", model), ("pruned", smaller)):
    export_onnx(made, rows(2), out / f"{name}.onnx", max_batch=8, sequence=64)
    build(out / f"{name}.onnx", target, out / f"{name}.engine.onnx")
    engines[name] = partial(load, out / f"{name}.engine.onnx", target)  # loaded again for every round
    arrays = {key: tensor.numpy() for key, tensor in inputs.items()}
    with torch.no_grad():
        expected = made(**inputs).numpy()
    np.testing.assert_allclose(engines[name]().run(arrays)[made.output_name], expected, atol=1e-4)

found = measure_latency(engines["base"], engines["pruned"], arrays, target=target.name, batch=8, sequence=64, seed=0)
print(f"{found.base_ms.p50:.2f} ms unpruned, {found.pruned_ms.p50:.2f} ms pruned (medians of one call at 8 x 64)")
print(f"speedup {found.speedup.median:.2f}, 95 % interval {found.speedup.ci_low:.2f} to {found.speedup.ci_high:.2f}")
print(f"the unpruned engine against itself strays by {found.noise_floor:.3f}")
