"""Detect the format of a checkpoint file by its first bytes, so that an error can say what to do with it."""

from __future__ import annotations

import zipfile
from pathlib import Path

from optin_export.errors import InputError
from optin_export.workdir.opening import open_regular

#: Number of bytes that are read.
_HEAD = 512
#: Supported formats of checkpoints.
SAFETENSORS, PICKLE, INDEX = "safetensors", "pickle", "index"

_STATE_DICT = "save the weights alone, where the model is: torch.save(model.state_dict(), 'weights.pth')"
_CONVERT = "convert it to PyTorch with the library that wrote it, then torch.save(model.state_dict(), 'weights.pth')"
_DOWNLOAD = "download the file itself; its size should be that of the weights"

#: First bytes -> (what the file is, what to do).
_MAGIC: tuple[tuple[bytes, str, str], ...] = (
    (b"\x89HDF\r\n\x1a\n", "an HDF5 file, as Keras and TensorFlow write them", _CONVERT),
    (b"GGUF", "a GGUF file: weights for llama.cpp, usually quantised", "use the PyTorch checkpoint it was made from"),
    (
        b"version https://git-lfs",
        "a Git LFS pointer instead of the file",
        f"run git lfs pull, or {_DOWNLOAD}",
    ),
    (b"\x93NUMPY", "a single NumPy array", _CONVERT),
    (b"\x1f\x8b", "compressed with gzip", "unpack it and give the file inside"),
    (b"BZh", "compressed with bzip2", "unpack it and give the file inside"),
    (b"\xfd7zXZ\x00", "compressed with xz", "unpack it and give the file inside"),
    (b"\x28\xb5\x2f\xfd", "compressed with Zstandard", "unpack it and give the file inside"),
    (b"7z\xbc\xaf\x27\x1c", "a 7-Zip archive", "unpack it and give the file inside"),
    (b"Rar!", "a RAR archive", "unpack it and give the file inside"),
)
#: Suffix -> the same, for formats without typical first bytes.
_SUFFIXES: dict[str, tuple[str, str]] = {
    ".onnx": ("an ONNX graph, not a checkpoint", "give the PyTorch checkpoint that it was exported from"),
    ".msgpack": ("a Flax (JAX) checkpoint", _CONVERT),
    ".h5": ("a Keras or TensorFlow checkpoint", _CONVERT),
    ".keras": ("a Keras model", _CONVERT),
    ".tflite": ("a TensorFlow Lite model", _CONVERT),
    ".pb": ("a TensorFlow graph", _CONVERT),
    ".index": ("the index of a TensorFlow checkpoint", _CONVERT),
    ".meta": ("the graph of a TensorFlow checkpoint", _CONVERT),
    ".plan": ("a TensorRT engine", "give the PyTorch checkpoint that it was built from"),
    ".engine": ("a TensorRT engine", "give the PyTorch checkpoint that it was built from"),
    ".distcp": ("one part of a torch.distributed checkpoint", "convert the folder with dcp_to_torch_save"),
}


def kind_of(path: Path) -> str:
    """How to read the checkpoint `path`: SAFETENSORS, PICKLE (torch.save) or INDEX (a JSON list of shards).

    Raises InputError, which names the format, for a file of another kind, and OSError for one that cannot be read.
    """
    with open_regular(path) as file:
        head = file.read(_HEAD)
    size = path.stat().st_size
    if not head:
        raise refusal(path, "the file is empty", "the download or copy failed: download or copy it again")
    for magic, what, fix in _MAGIC:
        if head.startswith(magic):
            raise refusal(path, f"it is {what}", fix)
    text = head.lstrip().lower()
    if text.startswith((b"<!doctype", b"<html", b"<?xml")):
        raise refusal(path, "it is a web page saved with this name: a login or error page", _DOWNLOAD)
    if head[257:262] == b"ustar":
        raise refusal(path, "it is a tar archive", "unpack it and give the file inside")
    if head.startswith(b"PK\x03\x04"):
        return _kind_of_archive(path)
    suffixes = path.name.lower().split(".")[1:]
    if text.startswith((b"{", b"[")):
        return INDEX
    if int.from_bytes(head[:8], "little") < size and head[8:9] == b"{":
        return SAFETENSORS
    if path.suffix == ".safetensors":
        raise refusal(path, "it does not begin as a safetensors file: damaged, or of another format", _DOWNLOAD)
    if path.suffix.lower() in _SUFFIXES:
        raise refusal(path, f"it is {_SUFFIXES[path.suffix.lower()][0]}", _SUFFIXES[path.suffix.lower()][1])
    if any(part.startswith("data-0") for part in suffixes):
        raise refusal(path, "it is a part of a TensorFlow checkpoint", _CONVERT)
    if head[0] == 0x08 and head[2:3] in (b"\x12", b"\x1a", b"\x3a", b"\x42"):
        raise refusal(path, "it is an ONNX graph, not a checkpoint", _SUFFIXES[".onnx"][1])
    if head[0] != 0x80:
        raise refusal(path, "its first bytes match no known format", "give a .safetensors file or a state dict")
    return PICKLE


def _kind_of_archive(path: Path) -> str:
    """The kind of a zip archive, which torch.save and other programs write."""
    if not zipfile.is_zipfile(path):
        raise refusal(path, "the file is truncated", "fetch or copy it again")
    with zipfile.ZipFile(path) as archive:
        names = archive.namelist()
    inside = {name.partition("/")[2] or name for name in names}
    if "constants.pkl" in inside or any(name.startswith("code/") for name in inside):
        why = "it is a TorchScript archive (torch.jit.save), a compiled program"
        raise refusal(path, why, _STATE_DICT)
    if any(name.startswith(("archive_format", "models/", "serialized_exported_program")) for name in (*inside, *names)):
        raise refusal(path, "it is an exported program (torch.export.save)", _STATE_DICT)
    if any(name.endswith((".weights.h5", ".h5")) for name in names):
        raise refusal(path, "it is a Keras model", _CONVERT)
    if names and all(name.endswith(".npy") for name in names):
        raise refusal(path, "it holds NumPy arrays (.npz), as JAX checkpoints do", _CONVERT)
    if "data.pkl" not in inside:
        raise refusal(path, "it is a zip archive that torch.save did not write", "unpack it and give the file inside")
    return PICKLE


def refusal(path: Path, why: str, fix: str) -> InputError:
    """The error for a checkpoint that cannot be read."""
    return InputError(f"cannot read the checkpoint {path}", why, fix)
