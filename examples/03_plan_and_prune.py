"""A BERT of transformers under two budgets: what is kept of each block, and a smaller model of the same class.

Random weights of a small BERT, so that nothing is downloaded; `AutoModel.from_pretrained(...)` in their place.
"""

import os
from pathlib import Path

import torch
import transformers

import optin_export as oe

out = Path(os.environ.get("OUT", "runs/examples"))
torch.manual_seed(0)
config = transformers.BertConfig(hidden_size=128, num_hidden_layers=2, num_attention_heads=4, intermediate_size=512)
model = transformers.BertModel(config)
# What a tokenizer returns for a batch: `dict(tokenizer(texts, padding=True, return_tensors="pt"))`.
batches = [
    {"input_ids": torch.randint(1000, 30000, (16, 32)), "attention_mask": torch.ones(16, 32, dtype=torch.long)}
    for _ in range(2)
]

for share in (0.8, 0.5):
    small = oe.prune(model, batches, macs=share)
    print(small)
    assert small.report["macs"]["ratio"] <= share
    with torch.no_grad():
        print("token states:", tuple(small.model(**batches[0]).last_hidden_state.shape))

small.save(out / "bert")
print("saved and loaded:", type(oe.load_model(out / "bert").model).__name__)
