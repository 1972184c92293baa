"""Weights, arrays and configurations by anybody: code in pickles, headers that claim too much, endless models."""

from __future__ import annotations

import io
import json
import pickle
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.attacks.attempt import attempt
from tests.attacks.conftest import Count, Folder
from tests.attacks.matrix import ALL
from tests.fuzz.oracle import Bomb, bomb

Make = Callable[[Path], bytes]


def archive(files: dict[str, bytes]) -> bytes:
    made = io.BytesIO()
    with zipfile.ZipFile(made, "w", zipfile.ZIP_DEFLATED) as target:
        for name, data in files.items():
            target.writestr(name, data)
    return made.getvalue()


def saved(value: Any, **options: Any) -> bytes:
    made = io.BytesIO()
    torch.save(value, made, **options)
    return made.getvalue()


def tensors(header: Any, data: bytes = b"", length: int | None = None) -> bytes:
    """A file of safetensors with this header."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def array(dtype: str, shape: str, version: bytes = b"\1\0") -> bytes:
    """A .npy file with this header and no values."""
    text = f"{{'descr': {dtype}, 'fortran_order': False, 'shape': {shape}}}".ljust(117).encode() + b"\n"
    return b"\x93NUMPY" + version + struct.pack("<H", len(text)) + text


def one(**fields: Any) -> dict[str, Any]:
    return {"w": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4], **fields}}


def objects(root: Path) -> bytes:
    made = io.BytesIO()
    np.save(made, np.array([Bomb(root)], dtype=object), allow_pickle=True)
    return archive({"images.npy": made.getvalue(), "labels.npy": made.getvalue()})


SMALL = {"images.npy": array("'|u1'", "(1, 16, 16)"), "labels.npy": array("'<i8'", "(1,)")}
PICKLES: dict[str, Make] = {
    "code": bomb,
    "code, protocol 0": lambda root: bomb(root, 0),
    "code, protocol 5": lambda root: bomb(root, 5),
    "code in torch.save": lambda root: saved({"model": Bomb(root)}),
    "code in the old format": lambda root: saved({"w": Bomb(root)}, _use_new_zipfile_serialization=False),
    "code beside a tensor": lambda root: saved({"model": {"w": torch.ones(2)}, "x": Bomb(root)}),
    "code in an archive": lambda root: archive({"a/data.pkl": bomb(root), "a/version": b"3\n"}),
    "os.system": lambda root: b"cos\nsystem\n(S'touch canary'\ntR.",
    "getattr": lambda root: b"cbuiltins\ngetattr\n(cos\nS'system'\ntR(S'touch canary'\ntR.",
    "an endless list": lambda root: b"\x80\x04" + b"]" * 100_000 + b".",
    "a huge text": lambda root: b"\x80\x04\x8d" + struct.pack("<Q", 1 << 60) + b"x.",
    "nested": lambda root: b"\x80\x04" + b"(" * 100_000 + b"t" * 100_000 + b".",
    "no end": lambda root: b"\x80\x04}",
    "a bomb": lambda root: archive({"a/data.pkl": pickle.dumps({}), "a/data/0": bytes(1 << 29)}),
    "no tensors": lambda root: saved({"model": {"a": 1}}),
    "a list of tensors": lambda root: saved([torch.ones(1)]),
    "other tensors": lambda root: saved({"model": {"x": torch.ones(1)}}),
}
SAFE: dict[str, Make] = {
    "offsets beyond the end": lambda root: tensors(one(data_offsets=[0, 1 << 40])),
    "offsets backwards": lambda root: tensors(one(data_offsets=[4, 0]), bytes(4)),
    "offsets below zero": lambda root: tensors(one(data_offsets=[-4, 0]), bytes(4)),
    "overlapping": lambda root: tensors({**one(), "v": one()["w"]}, bytes(4)),
    "a gap": lambda root: tensors(one(data_offsets=[4, 8]), bytes(8)),
    "a huge shape": lambda root: tensors(one(shape=[1 << 40, 1 << 40]), bytes(4)),
    "a shape below zero": lambda root: tensors(one(shape=[-1]), bytes(4)),
    "a shape that overflows": lambda root: tensors(one(shape=[1 << 63, 2]), bytes(4)),
    "an unknown dtype": lambda root: tensors(one(dtype="F7"), bytes(4)),
    "a header beyond the end": lambda root: tensors(one(), bytes(4), 1 << 62),
    "a header of nothing": lambda root: tensors(b"", b"", 0),
    "a header that is cut": lambda root: tensors(one(), bytes(4), 9),
    "a nested header": lambda root: tensors(b"[" * 100_000),
    "a key twice": lambda root: tensors(b'{"w":1,"w":2}'),
    "a list": lambda root: tensors([1]),
    "metadata that is none": lambda root: tensors({"__metadata__": {"a": 1}, **one()}, bytes(4)),
    "more than it says": lambda root: tensors(one(), bytes(400)),
    "other weights": lambda root: tensors(one(), bytes(4)),
    "a pickle": bomb,
}
ARRAYS: dict[str, Make] = {
    "objects": objects,
    "a bomb": lambda root: archive({"images.npy": array("'|u1'", f"({1 << 29},)") + bytes(1 << 29), **SMALL}),
    "a huge shape": lambda root: archive({**SMALL, "images.npy": array("'|u1'", f"({1 << 50}, 16, 16)")}),
    "a shape below zero": lambda root: archive({**SMALL, "images.npy": array("'|u1'", "(-1, 16, 16)")}),
    "a shape that is code": lambda root: archive({**SMALL, "images.npy": array("'|u1'", "__import__('os')")}),
    "a dtype that is code": lambda root: archive({**SMALL, "images.npy": array("'O'", "(1,)") + bomb(root)}),
    "no values": lambda root: archive(SMALL),
    "version 9": lambda root: archive({**SMALL, "images.npy": array("'|u1'", "(1,)", b"\9\0")}),
    "no array": lambda root: archive({**SMALL, "images.npy": b"hello"}),
    "no rows": lambda root: archive(
        {"images.npy": array("'|u1'", "(0, 16, 16)"), "labels.npy": array("'<i8'", "(0,)")}
    ),
    "names that lead out": lambda root: archive({"../../images.npy": b"x", "/labels.npy": b"x"}),
    "no images": lambda root: archive({"labels.npy": SMALL["labels.npy"]}),
    "an empty archive": lambda root: archive({}),
    "cut": lambda root: archive(SMALL)[:60],
    "a pickle": bomb,
}
LARGE = (10**6, 2**31, 2**63, 10**400, -1, 0, 1.5, "x", None, [1])
CONFIGS: dict[str, dict[str, Any]] = {
    **{f"num_hidden_layers {value!r:.9}": {"num_hidden_layers": value} for value in LARGE},
    **{f"hidden_size {value!r:.9}": {"hidden_size": value} for value in LARGE},
    **{f"vocab_size {value!r:.9}": {"vocab_size": value} for value in (2**40, -1, "x", [1])},
    **{f"model_type {value!r:.20}": {"model_type": value} for value in ("../../x", "", None, 7, "x" * 5000)},
    "code of its own": {"auto_map": {"AutoConfig": "evil.X", "AutoModel": "evil.X"}, "model_type": "evil"},
    "quantised": {"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}},
    "an activation that is code": {"hidden_act": "__import__('os').system"},
}
PLACES: dict[str, tuple[str, str, dict[str, Make]]] = {
    "pickles": ("pt", "vit.pt", PICKLES),
    "pickles of transformers": ("csv", "bert/pytorch_model.bin", PICKLES),
    "safetensors": ("npz", "vit.safetensors", SAFE),
    "safetensors of transformers": ("csv", "bert/model.safetensors", SAFE),
    "arrays": ("npz", "images.npz", ARRAYS),
}
WAYS = (["--dry-run"], ["--out", "new", "--stop-after", "sources", "--quiet"])
CASES = [(place, name) for place, (_, _, made) in PLACES.items() for name in made]


@pytest.mark.parametrize(("place", "name"), CASES if ALL else CASES[::22])
@pytest.mark.parametrize("way", (0, 1) if ALL else (1,))
def test_file(place: str, name: str, way: int, copied: Folder, tmp_path: Path, count: Count) -> None:
    folder = copied("inputs")
    recipe, file, made = PLACES[place]
    if file.endswith(".bin"):
        (folder / "bert" / "model.safetensors").unlink()
    (folder / file).write_bytes(made[name](tmp_path))
    count(place.split(" of ")[0] if place != "arrays" else "npz files")
    found = attempt([folder / f"{recipe}.yaml", *WAYS[way]])
    assert found.is_clean and found.code == 2, found.told


@pytest.mark.parametrize("name", list(CONFIGS) if ALL else list(CONFIGS)[::11])
def test_configuration(name: str, copied: Folder, count: Count) -> None:
    folder = copied("inputs")
    path = folder / "bert" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **CONFIGS[name]}))
    (folder / "bert" / "evil.py").write_text("open('canary', 'w')\nclass X: pass\n")
    count("config.json")
    found = attempt([folder / "csv.yaml", *WAYS[1]])
    assert found.is_clean and found.code == 2, found.told
