"""Saved models and checkpoints by anybody: opening one runs nothing, and takes no more memory than a model would."""

from __future__ import annotations

import io
import json
import shutil
import struct
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from optin_export.engines.torch import _read
from optin_export.models.checkpoints import load_checkpoint
from optin_export.pruning import load_model
from optin_export.search import read_plan
from tests.fuzz.oracle import Bomb, bomb, canary, harmless
from tests.fuzz.strategies import mangled, twisted


@pytest.fixture
def saved(finished: Path, tmp_path: Path) -> Path:
    shutil.copytree(finished / "model", tmp_path / "run" / "model", dirs_exist_ok=True)
    return tmp_path / "run" / "model"


def opened(folder: Path, target: str) -> None:
    with harmless(target, folder.parents[1]):
        load_model(folder)


def rewritten(folder: Path, **changes: Any) -> None:
    path = folder / "architecture.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@given(data=st.data())
def test_architectures(data: st.DataObject, finished: Path, saved: Path) -> None:
    whole = json.loads((finished / "model" / "architecture.json").read_text())
    (saved / "architecture.json").write_text(json.dumps(data.draw(twisted(whole))))
    opened(saved, "architecture.json")


@given(data=st.data())
def test_architectures_as_text(data: st.DataObject, finished: Path, saved: Path) -> None:
    (saved / "architecture.json").write_bytes(data.draw(mangled((finished / "model/architecture.json").read_bytes())))
    opened(saved, "architecture.json")


BERT = {
    "library": "transformers",
    "class": "BertModel",
    "config": {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16},
    "task": "feature-extraction",
    "pooling": "mean",
    "normalize": False,
}


@given(data=st.data())
def test_architectures_of_transformers(data: st.DataObject, saved: Path) -> None:
    names = [
        "BertModel",
        "ViTModel",
        "GPT2LMHeadModel",
        "ResNetModel",
        "LlamaModel",
        "PreTrainedModel",
        "Trainer",
        "os",
    ]
    more = st.sampled_from(
        [
            {"_attn_implementation": "evil/kernels"},
            {"attn_implementation": "flash_attention_2"},
            {"auto_map": {"AutoModel": "evil--model.Model"}, "trust_remote_code": True},
            {"quantization_config": {"quant_method": "gptq", "bits": 4}},
            {"use_timm_backbone": True, "backbone": "hf-hub:evil/model", "use_pretrained_backbone": True},
            {"hidden_act": "__import__('os').system('x')"},
            {"num_hidden_layers": 10**9},
            {"hidden_size": 10**9},
            {"vocab_size": 10**12},
            {"dtype": "os.system", "torch_dtype": "float99"},
            {"label2id": {"a": []}, "id2label": {"x": 1}},
        ]
    )
    base = {**BERT, "class": data.draw(st.sampled_from(names)), "config": {**BERT["config"], **data.draw(more)}}
    shape = data.draw(st.sampled_from([[2, 8], [2, 10**6], [1], [2, 3, 32, 32]]))
    rewritten(saved, base=data.draw(twisted(base, changes=1) | st.just(base)), inputs={"input_ids": ["int64", shape]})
    opened(saved, "architecture.json")


@pytest.mark.parametrize(
    "base",
    [
        {"name": "vit_tiny_patch16_224", "args": {"checkpoint_path": "BOMB"}},
        {"name": "vit_tiny_patch16_224", "args": {"pretrained_cfg": {"file": "BOMB"}, "pretrained": True}},
        {"name": "vit_tiny_patch16_224", "args": {"img_size": 10**7}},
        {"name": "vit_tiny_patch16_224", "args": {"depth": 10**9, "embed_dim": 3, "num_heads": 1}},
        {"name": "vit_tiny_patch16_224", "args": {"embed_dim": 10**9}},
        {"name": "swin_tiny_patch4_window7_224", "args": {"window_size": 30_000, "img_size": 120_000}},
        {"name": "hf-hub:evil/model", "args": {}},
        {"name": "local-dir:FOLDER", "args": {}},
        {"library": "python", "source": "py:FOLDER/code.py:make", "args": {}},
        {"library": "python", "source": "py:os:system", "args": {"command": "touch CANARY"}},
    ],
    ids=range(10),
)
def test_architectures_that_would_read_or_run_files(base: dict, saved: Path, tmp_path: Path) -> None:
    (tmp_path / "bomb.pth").write_bytes(bomb(tmp_path))
    (tmp_path / "code.py").write_text(f"open({str(canary(tmp_path))!r}, 'w')\ndef make(): ...\n")
    text = json.dumps(base).replace("BOMB", str(tmp_path / "bomb.pth")).replace("FOLDER", str(tmp_path))
    known = json.loads((saved / "architecture.json").read_text())["base"]
    rewritten(saved, base={**known, **json.loads(text.replace("CANARY", str(canary(tmp_path))))})
    opened(saved, "architecture.json")


@given(data=st.data())
def test_weights(data: st.DataObject, finished: Path, saved: Path) -> None:
    (saved / "model.safetensors").write_bytes(
        data.draw(mangled((finished / "model" / "model.safetensors").read_bytes(), head=600))
    )
    opened(saved, "safetensors")


@given(data=st.data())
def test_headers_of_weights(data: st.DataObject, finished: Path, saved: Path) -> None:
    whole = (finished / "model" / "model.safetensors").read_bytes()
    length = struct.unpack("<Q", whole[:8])[0]
    header = data.draw(twisted(json.loads(whole[8 : 8 + length])))
    text = json.dumps(header).encode()
    claimed = data.draw(st.sampled_from([len(text)] * 6 + [0, 7, 2**63, 2**64 - 1, len(text) + 8]))
    (saved / "model.safetensors").write_bytes(struct.pack("<Q", claimed) + text + whole[8 + length :])
    opened(saved, "safetensors")


@given(data=st.data())
def test_plans(data: st.DataObject, finished: Path, tmp_path: Path) -> None:
    text = (finished / "plan" / "plan.json").read_text()
    content = data.draw(
        st.one_of(twisted(json.loads(text)).map(lambda plan: json.dumps(plan).encode()), mangled(text.encode()))
    )
    (tmp_path / "plan.json").write_bytes(content)
    with harmless("plan.json", tmp_path):
        read_plan(tmp_path / "plan.json")


def archive(root: Path, packed: bool) -> bytes:
    """A checkpoint whose archive is torch's, with a bomb for a pickle, or one that grows a thousandfold."""
    out = io.BytesIO()
    torch.save({"a": torch.zeros(2_000_000 if packed else 4)}, out)
    made = io.BytesIO()
    with zipfile.ZipFile(out) as old, zipfile.ZipFile(made, "w", zipfile.ZIP_DEFLATED if packed else 0) as new:
        for name in old.namelist():
            new.writestr(name, bomb(root) if name.endswith("data.pkl") and not packed else old.read(name))
    return made.getvalue()


@given(data=st.data())
def test_checkpoints(data: st.DataObject, tmp_path: Path) -> None:
    model = torch.nn.Linear(3, 2)
    good = io.BytesIO()
    torch.save(model.state_dict(), good)
    legacy = io.BytesIO()
    torch.save(model.state_dict(), legacy, _use_new_zipfile_serialization=False)
    disguised = io.BytesIO()
    torch.save({"weight": Bomb(tmp_path)}, disguised)
    content = data.draw(
        st.one_of(
            mangled(good.getvalue()),
            mangled(legacy.getvalue(), head=200),
            mangled(disguised.getvalue()),
            st.sampled_from([bomb(tmp_path, p) for p in (0, 2, 4)]),
            st.sampled_from([archive(tmp_path, True), archive(tmp_path, False), disguised.getvalue()]),
        )
    )
    path = tmp_path / data.draw(st.sampled_from(["a.pt", "a.safetensors", "a.bin", "a"]))
    path.write_bytes(content)
    with harmless("checkpoint", tmp_path):
        load_checkpoint(model, str(path))


@given(data=st.data())
def test_programs(data: st.DataObject, finished: Path, tmp_path: Path) -> None:
    """Exported programs of torch: bytes, and what their graphs call."""
    whole = (finished / "onnx" / "pruned.pt2").read_bytes()
    call = data.draw(
        st.sampled_from(["torch.os.system", "torch.serialization.load", "builtins.exec", "_operator", "#x", None])
    )
    path = tmp_path / "a.pt2"
    if call is None:
        path.write_bytes(data.draw(mangled(whole)))
    else:
        with zipfile.ZipFile(io.BytesIO(whole)) as old, zipfile.ZipFile(path, "w") as new:
            for name in old.namelist():
                content = old.read(name)
                if "models/" in name and name.endswith(".json"):
                    content = content.replace(b"torch.ops.aten.add.Tensor", call.encode())
                if data.draw(st.integers(0, 3)) == 0 and name.endswith(".pt"):
                    content = bomb(tmp_path)
                new.writestr(name, content)
    with harmless("pt2", tmp_path):
        _read(path)
