"""What is opened is a regular file of bounded size, and what is written stays below its folder."""

from __future__ import annotations

import os
import resource
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from optin_export.errors import EnvironmentLacks, InputError
from optin_export.workdir.files import (
    Scratch,
    append_text,
    atomic_path,
    clear_scratch,
    confined,
    open_regular,
    read_json,
    read_text,
    regular,
    sha256_file,
    write_json,
    write_text,
    writing,
)
from optin_export.workdir.torch_files import sink
from tests.attacks.attempt import alarm
from tests.attacks.things import NO_FILES, THINGS

READERS: dict[str, Callable[[Path], Any]] = {
    "open": lambda path: open_regular(path).read(1),
    "text": lambda path: read_text(path, 1 << 20),
    "json": lambda path: read_json(path, 1 << 20),
    "hash": sha256_file,
    "by a library": regular,
}


@pytest.mark.parametrize("thing", NO_FILES)
@pytest.mark.parametrize("reader", READERS)
def test_what_is_no_file_is_not_opened(thing: str, reader: str, tmp_path: Path) -> None:
    NO_FILES[thing](tmp_path / "x")
    with alarm(20), pytest.raises(OSError):
        READERS[reader](tmp_path / "x")


@pytest.mark.parametrize("thing", THINGS)
def test_json_that_is_none(thing: str, tmp_path: Path) -> None:
    THINGS[thing](tmp_path / "x")
    with alarm(20), pytest.raises((OSError, ValueError, KeyError, TypeError, IndexError)):
        read_json(tmp_path / "x", 1 << 20)["files"]["x"]


def test_a_hash_is_of_what_there_was(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"12345")
    assert sha256_file(tmp_path / "x")[:8] == "5994471a"
    with pytest.raises(ValueError, match="larger than 4 bytes"):
        regular(tmp_path / "x", 4)
    assert regular(tmp_path / "x", 5) == tmp_path / "x"


@pytest.fixture
def outside(tmp_path: Path) -> Path:
    (tmp_path / "outside").mkdir()
    (tmp_path / "run").mkdir()
    return tmp_path / "outside"


@pytest.mark.parametrize("name", ["a/x.json", "a/b/x.json", "a/b/c/x.json"])
@pytest.mark.parametrize("write", [write_text, append_text])
def test_no_link_on_the_way_is_followed(
    name: str, write: Callable[[Path, str], None], outside: Path, tmp_path: Path
) -> None:
    (tmp_path / "run" / "a").symlink_to(outside)
    with confined(tmp_path / "run"), pytest.raises(InputError, match="'a' on the way is a link"):
        write(tmp_path / "run" / name, "x")
    assert not list(outside.iterdir())
    (tmp_path / "run" / "a").unlink()
    with confined(tmp_path / "run"):
        write(tmp_path / "run" / name, "x")
    assert (tmp_path / "run" / name).read_text() == "x"


def test_the_folder_itself_may_be_reached_through_one(outside: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(outside)
    with confined(tmp_path / "link"):
        write_text(tmp_path / "link" / "a" / "x", "x")
    assert (outside / "a" / "x").read_text() == "x"


def test_a_link_at_the_end_is_replaced_not_followed(outside: Path, tmp_path: Path) -> None:
    (outside / "x").write_text("precious")
    (tmp_path / "run" / "x").symlink_to(outside / "x")
    write_text(tmp_path / "run" / "x", "new")
    assert (outside / "x").read_text() == "precious" and not (tmp_path / "run" / "x").is_symlink()
    (tmp_path / "run" / "log").symlink_to(outside / "x")
    with pytest.raises(EnvironmentLacks):
        append_text(tmp_path / "run" / "log", "more")
    assert (outside / "x").read_text() == "precious"


def test_a_folder_that_is_renamed_meanwhile(outside: Path, tmp_path: Path) -> None:
    """What was begun in a folder ends in it, wherever its name leads by then."""
    (tmp_path / "run" / "a").mkdir()
    with atomic_path(tmp_path / "run" / "a" / "x") as temporary:
        (tmp_path / "run" / "a").rename(tmp_path / "moved")
        (tmp_path / "run" / "a").symlink_to(outside)
        temporary.write_text("x")
    assert (tmp_path / "moved" / "x").read_text() == "x" and not list(outside.iterdir())


def test_what_replaced_the_temporary_file_is_not_published(tmp_path: Path) -> None:
    with pytest.raises(EnvironmentLacks), atomic_path(tmp_path / "x") as temporary:
        temporary.unlink()
        os.mkfifo(temporary)
    assert not list(tmp_path.iterdir())


def test_folders_are_closed_again(tmp_path: Path) -> None:
    before = len(list(Path("/proc/self/fd").iterdir()))
    for index in range(20):
        write_json(tmp_path / "a" / "b" / f"{index}.json", {})
        with pytest.raises(RuntimeError), atomic_path(tmp_path / "c" / "x"):
            raise RuntimeError("of another kind")
    assert len(list(Path("/proc/self/fd").iterdir())) == before


def test_scratch_of_others_is_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    own, fifo, link = Scratch(), tmp_path / "optin-export-scratch-fifo", tmp_path / "optin-export-scratch-link"
    fifo.mkdir()
    os.mkfifo(fifo / "lock")
    (tmp_path / "victim").mkdir()
    (tmp_path / "victim" / "lock").write_text("precious")
    link.symlink_to(tmp_path / "victim")
    with alarm(20):
        clear_scratch(age=-1)
    assert own.path.is_dir() and fifo.is_dir() and (tmp_path / "victim" / "lock").read_text() == "precious"
    own.close()


def test_scratch_of_a_process_killed_before_it_had_its_lock_is_deleted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    bare = tmp_path / "optin-export-scratch-bare"
    bare.mkdir()
    clear_scratch()
    assert bare.is_dir(), "its process may be about to take the lock"
    os.utime(bare, (0, 0))
    clear_scratch()
    assert not bare.exists()


@pytest.fixture
def short_files() -> Iterator[None]:
    """No file may become longer than 4 KiB, as on a disk that is full."""
    before, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.getsignal(signal.SIGXFSZ)
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)
    signal.signal(signal.SIGXFSZ, handler)


def _safetensors(path: Path) -> None:
    from safetensors.numpy import save_file

    save_file({"x": np.zeros(100_000, np.float32)}, path)


def _safetensors_of_torch(path: Path) -> None:
    import torch
    from safetensors.torch import save_file

    save_file({"x": torch.zeros(100_000)}, path)


def _torch(path: Path) -> None:
    import torch

    with sink(path) as file:
        torch.save(torch.zeros(100_000), file)


def _program(path: Path) -> None:
    import torch

    program = torch.export.export(torch.nn.Linear(200, 200), (torch.ones(1, 200),))
    with sink(path) as file:
        torch.export.save(program, file)  # type: ignore[arg-type]


def _onnx(path: Path) -> None:
    import onnx

    tensor = onnx.numpy_helper.from_array(np.zeros(100_000, np.float32), "w")
    graph = onnx.helper.make_graph([], "g", [], [], [tensor])
    onnx.save_model(onnx.helper.make_model(graph), path)


def _onnxruntime(path: Path) -> None:
    import onnx
    import onnxruntime

    weights = onnx.numpy_helper.from_array(np.random.default_rng(0).random((200, 200), np.float32), "w")
    node = onnx.helper.make_node("MatMul", ["x", "w"], ["y"])
    ends = [onnx.helper.make_tensor_value_info(name, 1, ["n", 200]) for name in ("x", "y")]
    model = onnx.helper.make_model(
        onnx.helper.make_graph([node], "g", ends[:1], ends[1:], [weights]),
        opset_imports=[onnx.helper.make_opsetid("", 18)],
        ir_version=10,
    )
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(path)
    onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def _numpy(path: Path) -> None:
    with path.open("wb") as file:
        np.savez(file, x=np.random.default_rng(0).random(100_000))


def _tokenizer(path: Path) -> None:
    from tokenizers import Tokenizer, models

    Tokenizer(models.WordLevel({f"word{index}": index for index in range(5000)}, "word0")).save(str(path))


LIBRARIES = [
    _safetensors,
    _safetensors_of_torch,
    _torch,
    _program,
    _onnx,
    _onnxruntime,
    _numpy,
    _tokenizer,
]


@pytest.mark.parametrize("library", LIBRARIES)
@pytest.mark.parametrize("size", ["a full disk", "a limit"])
def test_a_full_disk_whichever_library_writes(
    library: Callable[[Path], None], size: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    """Libraries raise types of their own, or lose the system's error; for the user it is one, and nothing stays."""
    library(tmp_path / "warm-up")  # what is imported writes files of its own
    place = tmp_path / "limited"
    if size == "a limit":
        request.getfixturevalue("short_files")
    else:
        place = request.getfixturevalue("small_disk")("16k")
    with pytest.raises(EnvironmentLacks) as caught, atomic_path(place / "x.bin") as temporary:
        library(temporary)
    assert caught.value.exit_code == 5 and "cannot write" in caught.value.what
    assert not list(place.iterdir())


def test_errors_about_something_else_stay_what_they_are(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="of shape"), atomic_path(tmp_path / "x"):
        raise ValueError("a tensor of shape (3,)")
    with pytest.raises(InputError), atomic_path(tmp_path / "x"):
        raise InputError("what", "it says: No space left on device", "fix")
    with pytest.raises(EnvironmentLacks, match="cannot write"), writing(tmp_path / "x"):
        raise RuntimeError("PytorchStreamWriter failed writing file data/0: file write failed")
    assert not list(tmp_path.iterdir())
