"""What a cluster's work is made of, without a cluster: the machine's lock, parcels, remembered shards, costs."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import signal
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from optin_export.distributed.costs import Book, costs_of
from optin_export.distributed.file_transfer import Parcel, hashes_of, pack, unpack
from optin_export.distributed.finished_shards import Memory
from optin_export.distributed.measurement_lock import Machine
from optin_export.errors import InputError
from optin_export.scoring import Shard


def hold(folder: Path, how: str, said: Any, seconds: float) -> None:
    with getattr(Machine(folder), how)():
        said.put((how, "in", time.monotonic()))
        time.sleep(seconds)
        said.put((how, "out", time.monotonic()))


def started(folder: Path, how: str, said: Any, seconds: float) -> Any:
    process = multiprocessing.get_context("fork").Process(target=hold, args=(folder, how, said, seconds))
    process.start()
    return process


def test_nothing_runs_beside_a_measurement(tmp_path: Path) -> None:
    said = multiprocessing.get_context("fork").Queue()
    processes = [started(tmp_path, how, said, 0.3) for how in ("busy", "busy", "quiet", "quiet", "busy")]
    events = sorted((said.get(timeout=60) for _ in range(10)), key=lambda event: event[2])
    for process in processes:
        process.join()
    inside = {"busy": 0, "quiet": 0}
    for how, what, _ in events:
        inside[how] += 1 if what == "in" else -1
        assert inside["quiet"] == 0 or (inside["quiet"] == 1 and inside["busy"] == 0), events


def test_a_killed_process_frees_the_machine(tmp_path: Path) -> None:
    said = multiprocessing.get_context("fork").Queue()
    process = started(tmp_path, "quiet", said, 600)
    said.get(timeout=60)
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    with Machine(tmp_path).busy():
        pass


def test_an_interrupt_ends_a_wait(tmp_path: Path) -> None:
    said = multiprocessing.get_context("fork").Queue()
    measuring = started(tmp_path, "quiet", said, 600)
    said.get(timeout=60)
    waiting = started(tmp_path, "busy", said, 0)
    try:
        time.sleep(0.5)
        assert waiting.is_alive()
        os.kill(waiting.pid, signal.SIGINT)
        waiting.join(30)
        assert waiting.exitcode is not None and said.empty()
    finally:
        for process in (measuring, waiting):
            process.kill()
            process.join()


def test_who_computes_may_measure_and_go_on(tmp_path: Path) -> None:
    machine = Machine(tmp_path)
    with machine.busy():
        with machine.quiet():
            assert machine.held is not None
        assert machine.held is not None
        with Machine(tmp_path).busy():  # others may compute again
            pass
    assert machine.held is None


def test_a_parcel_arrives_as_it_was_sent(tmp_path: Path) -> None:
    source, target = tmp_path / "a", tmp_path / "b"
    (source / "x").mkdir(parents=True)
    (source / "x" / "one").write_bytes(b"1" * 1000)
    (source / "two").write_bytes(b"22")
    parcel = pickle.loads(pickle.dumps(pack(source, [source / "x" / "one", source / "two"])))
    assert parcel.size == 1002
    unpack(parcel, target)
    assert hashes_of(source) == hashes_of(target)
    (source / "two").write_bytes(b"3")
    assert set(pack(source, [source / "x" / "one", source / "two"], hashes_of(target)).files) == {"two"}


@pytest.mark.parametrize("name", ["../outside", "/tmp/outside"])
def test_a_parcel_stays_in_its_folder(tmp_path: Path, name: str) -> None:
    import hashlib

    with pytest.raises(InputError):
        unpack(Parcel({name: b"x"}, {name: hashlib.sha256(b"x").hexdigest()}), tmp_path / "in")
    assert not (tmp_path / "outside").exists()


def test_a_damaged_parcel_writes_nothing(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="did not arrive"):
        unpack(Parcel({"a": b"x", "b": b"y"}, {"a": "0" * 64, "b": "1" * 64}), tmp_path / "in")
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
