"""Checkpoints as training scripts write them: loaded exactly, or refused with what the file is and does not fit."""

from __future__ import annotations

import argparse
import collections
import datetime
import gzip
import json
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from optin_export.errors import InputError
from optin_export.models.checkpoints import load_checkpoint, split

State = dict[str, torch.Tensor]


class Net(nn.Module):
    """Names at two levels, a batch norm, and a weight under two names."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.stem = nn.Conv2d(3, 4, 3)
        self.blocks = nn.Sequential(nn.Sequential(nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4)), nn.Conv2d(4, 4, 1))
        self.embed, self.head = nn.Embedding(5, 4), nn.Linear(4, 5)
        self.head.weight = self.embed.weight


@pytest.fixture
def state() -> State:
    """Weights to be loaded: none is what a new model has."""
    return {
        name: tensor + 1 if tensor.is_floating_point() else tensor + 7 for name, tensor in Net(1).state_dict().items()
    }


def load(path: Path | str, net: nn.Module | None = None) -> tuple[State, list[str]]:
    net = net or Net()
    notes = load_checkpoint(net, str(path))
    return net.state_dict(), notes


def refused(path: Path | str, net: nn.Module | None = None) -> InputError:
    with pytest.raises(InputError) as caught:
        load(path, net)
    text = str(caught.value)
    assert text.count("\n") == 2 and "\x1b" not in text and caught.value.exit_code == 2
    return caught.value


def same(found: State, wanted: State) -> bool:
    return found.keys() == wanted.keys() and all(torch.equal(found[name], wanted[name]) for name in wanted)


def prefixed(state: State, prefix: str) -> State:
    return {prefix + name: tensor for name, tensor in state.items()}


# --- what loads ------------------------------------------------------------------------------------------------------

INSIDE = "_fsdp_wrapped_module._checkpoint_wrapped_module."
WRITTEN: dict[str, Callable[[State], Any]] = {
    "plain": lambda s: s,
    "ordered": lambda s: collections.OrderedDict(s),
    "parameters": lambda s: {name: nn.Parameter(t, t.is_floating_point()) for name, t in s.items()},
    "timm": lambda s: {"epoch": 1, "arch": "vit", "state_dict": s, "args": argparse.Namespace(lr=0.1), "metric": 1.0},
    "deit": lambda s: {
        "model": s,
        "optimizer": {"state": {0: {"exp_avg": s["stem.weight"]}}},
        "args": argparse.Namespace(),
    },
    "lightning": lambda s: {
        "state_dict": prefixed(s, "model."),
        "hyper_parameters": {"path": Path("/data"), "when": datetime.datetime(2024, 1, 2)},
        "rates": collections.deque([1]),
        "callbacks": collections.defaultdict(list, {"a": [1]}),
    },
    "lightning, net": lambda s: {"state_dict": prefixed(s, "net.")},
    "tutorial": lambda s: {"model_state_dict": s, "epoch": 3, "loss": torch.tensor(0.5)},
    "basicsr": lambda s: {"params_ema": s},
    "nested": lambda s: {"trainer": {"network": s}},
    "deepspeed": lambda s: {"module": s, "dp_world_size": 1, "mp_world_size": 1},
    "numpy scalar": lambda s: {
        "state_dict": s,
        "best": np.float64(81.2),
        "rng": np.arange(3),
        "kind": np.dtype("int8"),
    },
    "versions": lambda s: {
        "state_dict": s,
        "torch": torch.__version__,
        "schedule": torch.optim.SGD([nn.Parameter(torch.ones(1))], 0.1),
    },
    "DataParallel": lambda s: prefixed(s, "module."),
    "compiled in DataParallel": lambda s: prefixed(s, "module._orig_mod."),
    "DataParallel compiled": lambda s: {"model": prefixed(s, "_orig_mod.module.")},
    "FSDP": lambda s: {
        "_fsdp_wrapped_module." + name.replace("blocks.0.", f"blocks.0.{INSIDE}"): t for name, t in s.items()
    },
    "a part in DataParallel": lambda s: {name.replace("blocks.", "blocks.module."): t for name, t in s.items()},
    "tied once": lambda s: {name: t for name, t in s.items() if name != "head.weight"},
    "averaged model": lambda s: prefixed(s, "module.") | {"n_averaged": torch.tensor(3)},
    "without counters": lambda s: {name: t for name, t in s.items() if "num_batches" not in name},
    "profiled": lambda s: s | {"total_ops": torch.zeros(1), "stem.total_params": torch.zeros(1)},
    "beside other parts": lambda s: {"state_dict": prefixed(s, "model.") | {"criterion.weight": torch.ones(5)}},
}  # fmt: skip


@pytest.mark.parametrize("kind", WRITTEN)
@pytest.mark.parametrize("old", [False, True], ids=["zip", "old"])
def test_loaded_exactly(kind: str, old: bool, state: State, tmp_path: Path) -> None:
    torch.save(WRITTEN[kind](state), tmp_path / "x.pth", _use_new_zipfile_serialization=not old)
    found, notes = load(tmp_path / "x.pth")
    if kind == "without counters":
        state["blocks.0.1.num_batches_tracked"] = torch.tensor(0)
    assert same(found, state)
    told = {"averaged model", "without counters", "profiled", "beside other parts"}
    assert bool(notes) == (kind in told), notes


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_any_precision_is_cast(dtype: torch.dtype, state: State, tmp_path: Path) -> None:
    cast = {name: t.to(dtype) for name, t in state.items()}  # counters as well, as .half() of an old model
    torch.save(cast, tmp_path / "x.pth")
    found, _ = load(tmp_path / "x.pth")
    assert same(found, {name: cast[name].to(t.dtype) for name, t in state.items()})


@pytest.mark.parametrize("whole", ["model", "pytorch_model"])
def test_shards_by_their_index_or_folder(whole: str, state: State, tmp_path: Path) -> None:
    names = list(state)
    suffix = "safetensors" if whole == "model" else "bin"
    where = {}
    for number, part in enumerate((names[:3], names[3:]), 1):
        file = f"{whole}-0000{number}-of-00002.{suffix}"
        tensors = {name: state[name].clone() for name in part}
        save_file(tensors, tmp_path / file) if suffix == "safetensors" else torch.save(tensors, tmp_path / file)
        where |= dict.fromkeys(part, file)
    index = tmp_path / f"{whole}.{suffix}.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": where}))
    for path in (index, tmp_path):
        assert same(load(path)[0], state)
    for content, says in (
        ({"weight_map": {**where, "more": next(iter(where.values()))}}, "no shard contains more"),
        ({"weight_map": {**where, "stem.weight": "../x.safetensors"}}, "outside its folder"),
        ({"weight_map": {**where, "stem.weight": "none.safetensors"}}, "none.safetensors is missing"),
        ({"weights": 1}, "without a 'weight_map'"),
    ):
        index.write_text(json.dumps(content))
        assert says in refused(index).why
    index.unlink()
    assert same(load(tmp_path)[0], state)  # all shards are there
    (tmp_path / next(iter(where.values()))).unlink()
    assert "1 of 2 shards" in refused(tmp_path).why


def test_a_folder_with_one_checkpoint_or_several(state: State, tmp_path: Path) -> None:
    assert "no checkpoint" in refused(tmp_path).why
    torch.save(state, tmp_path / "last.ckpt")
    (tmp_path / "log.txt").write_text("x")
    assert same(load(tmp_path)[0], state)
    torch.save(state, tmp_path / "best.ckpt")
    assert "best.ckpt, last.ckpt" in refused(tmp_path).why
    save_file({name: t.clone() for name, t in state.items()}, tmp_path / "model.safetensors")
    assert same(load(tmp_path)[0], state)  # the name that from_pretrained takes


def test_the_average_is_taken_as_timm_does_and_said(state: State, tmp_path: Path) -> None:
    import timm

    other = {name: t * 2 for name, t in state.items()}
    for last, average in (("state_dict", "state_dict_ema"), ("model", "model_ema")):
        path = tmp_path / "x.pth"
        torch.save({last: state, average: prefixed(other, "module.")}, path)
        found, notes = load(path)
        reference = Net(5)
        timm.models.load_checkpoint(reference, str(path), weights_only=True)
        assert same(found, other) and same(reference.state_dict(), other)
        assert len(notes) == 1 and average in notes[0] and f"x.pth#{last}" in notes[0]
        assert same(load(f"{path}#{last}")[0], state) and same(load(f"{path}#{average}")[0], other)
    torch.save({"state_dict": state, "state_dict_ema": state}, path)
    assert load(path)[1] == []  # the same weights twice are no question


def test_several_sets_of_weights_are_not_guessed(state: State, tmp_path: Path) -> None:
    other = {name: t * 2 for name, t in state.items()}
    torch.save({"student": state, "teacher": other}, tmp_path / "a.pth")
    error = refused(tmp_path / "a.pth")
    assert "student, teacher" in error.why and "a.pth#student" in error.fix
    assert same(load(f"{tmp_path / 'a.pth'}#teacher")[0], other)
    assert "student, teacher" in refused(f"{tmp_path / 'a.pth'}#pupil").why
    torch.save({"state_dict": prefixed(state, "student.") | prefixed(other, "teacher.")}, tmp_path / "b.pth")
    assert "state_dict.student, state_dict.teacher" in refused(tmp_path / "b.pth").why
    assert same(load(f"{tmp_path / 'b.pth'}#state_dict.teacher")[0], other)


def test_a_file_with_a_hash_in_its_name(state: State, tmp_path: Path) -> None:
    torch.save(state, tmp_path / "run#3.pth")
    assert same(load(tmp_path / "run#3.pth")[0], state)
    assert split("/a/b.pth#c") == (Path("/a/b.pth"), "c") and split("/a/b.pth") == (Path("/a/b.pth"), None)


def test_names_that_a_model_has_of_its_own_stay(tmp_path: Path) -> None:
    """A part that is called `module` is no DataParallel."""
    nets = [nn.Sequential(collections.OrderedDict(module=nn.Linear(2, 2), head=nn.Linear(2, 2))) for _ in range(2)]
    for state in (nets[0].state_dict(), prefixed(nets[0].state_dict(), "module.")):
        torch.save(state, tmp_path / "x.pth")
        assert same(load(tmp_path / "x.pth", nets[1])[0], nets[0].state_dict())


# --- what does not fit -----------------------------------------------------------------------------------------------


def test_keys_and_shapes_that_do_not_fit_are_named(state: State, tmp_path: Path) -> None:
    def why(content: State) -> str:
        torch.save(content, tmp_path / "x.pth")
        error = refused(tmp_path / "x.pth")
        assert "does not fit" in error.what
        return error.why

    less = {name: t for name, t in state.items() if not name.startswith("stem")}
    assert "2 missing: stem.weight, stem.bias" in why(less)
    assert "2 unexpected: a.weight, a.bias" in why(state | {"a.weight": torch.ones(1), "a.bias": torch.ones(1)})
    assert "2 missing: stem.weight, stem.bias; 1 unexpected: stern.weight" in why(
        less | {"stern.weight": torch.ones(1)}
    )
    shape = why(state | {"head.bias": torch.ones(1000)})
    assert "head.bias is [1000] in the file and [5] in the model" in shape
    many = why(prefixed(state, "other_"))
    assert "13 missing: stem.weight, stem.bias, blocks.0.0.weight ...; 13 unexpected: other_stem.weight" in many


def test_values_that_are_no_plain_numbers(state: State, tmp_path: Path) -> None:
    for value, says in (
        (torch.ones(5, dtype=torch.int8), "head.bias is int8"),
        (torch.ones(5).to(torch.float8_e4m3fn), "head.bias is float8"),
        (torch.ones(5, dtype=torch.complex64), "head.bias is complex64"),
        (torch.ones(5, device="meta"), "meta device"),
    ):
        torch.save(state | {"head.bias": value}, tmp_path / "x.pth")
        assert says in refused(tmp_path / "x.pth").why
    torch.save(state | {"blocks.0.1.num_batches_tracked": torch.tensor(1.5)}, tmp_path / "x.pth")
    assert "num_batches_tracked is float32" in refused(tmp_path / "x.pth").why


# --- what cannot be read ---------------------------------------------------------------------------------------------


class Foreign:
    """A class of a training script."""


class Bomb:
    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return Path.touch, (self.mark,)


@pytest.mark.parametrize("old", [False, True], ids=["zip", "old"])
def test_what_names_code_is_refused_by_name_and_runs_nothing(old: bool, state: State, tmp_path: Path) -> None:
    mark, path = tmp_path / "ran", tmp_path / "x.pth"
    for content, name in (
        ({"state_dict": state, "args": Foreign()}, "tests.models.test_checkpoints.Foreign"),
        ({"state_dict": state, "args": argparse.Namespace(model=Foreign())}, "test_checkpoints.Foreign"),
        ({"state_dict": state, "args": Bomb(mark)}, "getattr"),
        ({"state_dict": state, "args": [print, eval]}, "builtins.print, builtins.eval"),
    ):
        torch.save(content, path, _use_new_zipfile_serialization=not old)
        error = refused(path)
        assert name in error.why and "model.state_dict()" in error.fix
    torch.save(Net(), path, _use_new_zipfile_serialization=not old)
    assert "a whole pickled module (tests.models.test_checkpoints.Net" in refused(path).why
    torch.save({"model": Net(), "epoch": 1}, path, _use_new_zipfile_serialization=not old)
    assert "a whole pickled module" in refused(path).why
    assert not mark.exists()


def test_harmless_objects_are_not_even_imported(state: State, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stand-ins take their place, so a library that is not installed is no hindrance, and a rigged one does nothing."""
    import sys
    import types

    ran: list[str] = []
    module = types.ModuleType("omegaconf")

    class DictConfig:
        def __setstate__(self, state: Any) -> None:
            ran.append("state")

        def __init__(self) -> None:
            self.content = {"lr": 0.1}

    DictConfig.__module__, DictConfig.__qualname__ = "omegaconf", "DictConfig"
    module.DictConfig = DictConfig  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "omegaconf", module)
    torch.save({"state_dict": state, "config": DictConfig()}, tmp_path / "x.pth")
    assert same(load(tmp_path / "x.pth")[0], state)
    monkeypatch.delitem(sys.modules, "omegaconf")
    assert same(load(tmp_path / "x.pth")[0], state) and not ran and "omegaconf" not in sys.modules


def _of_a_later_zip(archive: bytes) -> bytes:
    """Its first entry needs a version of the format that nobody has."""
    place = archive.index(b"PK\x01\x02")
    return archive[: place + 6] + b"\xff\xff" + archive[place + 8 :]


def test_other_files_are_told_for_what_they_are(state: State, tmp_path: Path) -> None:
    torch.save(state, tmp_path / "whole.pth")
    whole = (tmp_path / "whole.pth").read_bytes()
    torch.jit.trace(nn.Linear(2, 2), torch.ones(1, 2)).save(str(tmp_path / "script.pt"))
    torch.export.save(torch.export.export(nn.Linear(2, 2), (torch.ones(1, 2),)), str(tmp_path / "program.pt2"))
    np.savez(tmp_path / "jax.npz", a=np.ones(3))
    with zipfile.ZipFile(tmp_path / "photos.pth", "w") as archive:
        archive.writestr("a.txt", "x")
    files: dict[str, tuple[bytes | None, str]] = {
        "script.pt": (None, "TorchScript"),
        "program.pt2": (None, "exported program"),
        "jax.npz": (None, "NumPy arrays"),
        "photos.pth": (None, "torch.save did not write"),
        "page.pth": (b"\n<!DOCTYPE html><html>404", "a web page"),
        "lfs.pth": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 3\n", "Git LFS pointer"),
        "keras.pth": (b"\x89HDF\r\n\x1a\n" + bytes(100), "HDF5"),
        "llama.gguf": (b"GGUF" + bytes(100), "GGUF"),
        "flax.msgpack": (b"\x82\xa3abc", "Flax"),
        "tf.index": (bytes(100), "TensorFlow checkpoint"),
        "model.ckpt.data-00000-of-00001": (bytes(100), "TensorFlow checkpoint"),
        "graph.onnx": (b"\x08\x0a\x12\x07pytorch", "ONNX graph"),
        "graph.pth": (b"\x08\x0a\x12\x07pytorch", "ONNX graph"),
        "packed.pth": (gzip.compress(b"x"), "gzip"),
        "empty.pth": (b"", "empty"),
        "odd.pth": (_of_a_later_zip(whole), "damaged"),
        "cut.pth": (whole[: len(whole) // 2], "truncated"),
        "own.pkl": (pickle.dumps(state["stem.bias"].numpy(), protocol=2), "torch.save did not write"),
        "text.pth": (b"hello", "no known format"),
        "settings.json": (b'{"a": 1}', "without a 'weight_map'"),
        "cut.safetensors": (b"\x10\0\0\0\0\0\0\0{}", "safetensors"),
    }
    for name, (content, says) in files.items():
        if content is not None:
            (tmp_path / name).write_bytes(content)
        error = refused(tmp_path / name)
        assert "cannot read the checkpoint" in error.what and says in error.why, (name, str(error))
    save_file({"a": torch.ones(100)}, tmp_path / "b.safetensors")
    (tmp_path / "b.safetensors").write_bytes((tmp_path / "b.safetensors").read_bytes()[:200])
    assert "truncated" in refused(tmp_path / "b.safetensors").why
    for name, says in ((".metadata", "torch.distributed"), ("adapter_model.safetensors", "PEFT adapter")):
        folder = tmp_path / name.strip(".")
        folder.mkdir(exist_ok=True)
        (folder / name).write_bytes(b"x")
        assert says in refused(folder).why


class OfVersion(nn.Linear):
    """Reads its weights by the version that the checkpoint records, as torchvision's MNASNet does."""

    _version = 2

    def _load_from_state_dict(self, state_dict: State, prefix: str, local_metadata: Any, *rest: Any) -> None:
        if local_metadata.get("version") not in (1, 2):
            raise ValueError("version should be set to 1 or 2")
        if local_metadata["version"] == 1:
            state_dict[f"{prefix}weight"] = state_dict[f"{prefix}weight"] / 10
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *rest)


@pytest.mark.parametrize("kind", ["safetensors", "pth", "old.pth"])
def test_modules_that_ask_for_the_version_of_their_weights_are_loaded(kind: str, tmp_path: Path) -> None:
    """safetensors record none: then it is the current one. torch's files say which one it is."""
    net, path = OfVersion(3, 2), tmp_path / f"weights.{kind}"
    if kind == "old.pth":
        net._version = 1
    if kind == "safetensors":
        save_file(net.state_dict(), path)
    else:
        torch.save(net.state_dict(), path)
    found, _ = load(path, OfVersion(3, 2))
    torch.testing.assert_close(found["weight"], net.weight / 10 if kind == "old.pth" else net.weight.detach())
