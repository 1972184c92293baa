"""What a cluster's work is made of, without a cluster: parcels, remembered shards, costs."""

from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np
import pytest

from optin_export.distributed.costs import Book
from optin_export.distributed.file_transfer import PackedFiles, hashes_of, pack, unpack
from optin_export.distributed.finished_shards import Memory
from optin_export.errors import InputError
from optin_export.report import costs_of
from optin_export.scoring import Shard


def test_a_parcel_arrives_as_it_was_sent(tmp_path: Path) -> None:
    source, target = tmp_path / "a", tmp_path / "b"
    (source / "x").mkdir(parents=True)
    (source / "x" / "one").write_bytes(b"1" * 1000)
    (source / "two").write_bytes(b"22")
    packed = pickle.loads(pickle.dumps(pack(source, [source / "x" / "one", source / "two"])))
    assert packed.size == 1002
    unpack(packed, target)
    assert hashes_of(source) == hashes_of(target)
    (source / "two").write_bytes(b"3")
    assert set(pack(source, [source / "x" / "one", source / "two"], hashes_of(target)).files) == {"two"}


@pytest.mark.parametrize("name", ["../outside", "/tmp/outside"])
def test_a_parcel_stays_in_its_folder(tmp_path: Path, name: str) -> None:
    import hashlib

    with pytest.raises(InputError):
        unpack(PackedFiles({name: b"x"}, {name: hashlib.sha256(b"x").hexdigest()}), tmp_path / "in")
    assert not (tmp_path / "outside").exists()


def test_a_damaged_parcel_writes_nothing(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="did not arrive"):
        unpack(PackedFiles({"a": b"x", "b": b"y"}, {"a": "0" * 64, "b": "1" * 64}), tmp_path / "in")
    assert not (tmp_path / "in").exists()


def test_shards_are_remembered_by_content(tmp_path: Path) -> None:
    memory, shard = Memory(tmp_path, "key"), Shard("probes", 1, start=4, count=4, weight=0.1)
    found = {"0.a": np.arange(3.0), "1.a": np.array([1e-300, 0.1, np.pi])}
    assert memory.get(shard) is None
    memory.put(shard, found)
    again = Memory(tmp_path, "key").get(shard)
    assert again is not None and all(np.array_equal(again[name], array) for name, array in found.items())
    assert Memory(tmp_path, "other").get(shard) is None
    assert memory.get(Shard("probes", 1, start=4, count=4, weight=0.2)) is None
    (path,) = tmp_path.rglob("*.safetensors")
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    assert memory.get(shard) is None  # damaged: done again
    path.write_bytes(bytes(data[:20]))
    assert memory.get(shard) is None
    memory.clear()
    assert not list(tmp_path.rglob("*.safetensors"))


def test_costs_add_up_and_logs_are_per_worker(tmp_path: Path) -> None:
    book = Book(tmp_path)
    for worker, seconds in (("a-1", 1.5), ("b-2", 2.0), ("a-1", 0.25)):
        book.done("scoring", "a shard", {"worker": worker, "seconds": seconds, "gpus": 2, "printed": ["hello"]})
    book.save()
    Book(tmp_path).save()  # a later run that did nothing leaves them
    spent = costs_of(tmp_path)["scoring"]
    assert (spent["worker_seconds"], spent["gpu_seconds"], spent["tasks"], spent["workers"]) == (3.75, 7.5, 3, 2)
    assert (tmp_path / "cluster" / "a-1.log").read_text(encoding="utf-8").count("hello") == 2
    assert "2.000 s" in (tmp_path / "cluster" / "b-2.log").read_text(encoding="utf-8")
