"""What a client is told before it asks: addresses, names, tensors; and what it says of a server that is not there."""

from __future__ import annotations

import socket
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from optin_export import cli
from optin_export.errors import EnvironmentLacks, InputError, ParityError
from optin_export.serving.client import Connection, Model, Url, check_inputs
from optin_export.serving.deployed import Reference, check_answers
from optin_export.serving.server import HOST, free_ports
from optin_export.serving.traffic import Traffic


@pytest.mark.parametrize(
    ("text", "parsed"),
    [
        ("localhost:8001", Url("grpc", "localhost:8001", False)),
        ("grpcs://a-b.example:1", Url("grpc", "a-b.example:1", True)),
        ("http://127.0.0.1:8000/", Url("http", "127.0.0.1:8000", False)),
        ("https://[::1]:8000", Url("http", "[::1]:8000", True)),
    ],
)
def test_addresses(text: str, parsed: Url) -> None:
    assert Url.parse(text) == parsed
    assert Url.parse(str(parsed)) == parsed


@pytest.mark.parametrize(
    "text", ["", "host", "ftp://host:1", "http://host", "http://host:1/path", "a b:1", "http://u@h:1", "h:65536"]
)
def test_what_is_no_address(text: str) -> None:
    with pytest.raises(InputError, match="not the address of a server"):
        Url.parse(text)


def test_model_names() -> None:
    assert Model.parse("m:2") == Model("m", "2") and str(Model.parse("m")) == "m"
    for text in ("", ":1", "m:x"):
        with pytest.raises(InputError, match="is not a served model"):
            Model.parse(text)


ROWS = {"x": np.zeros((4, 3), np.float32)}
FOUND: dict[str, Any] = {"inputs": {"x": ("FP32", (-1, 3))}, "outputs": {"y": ("FP32", (-1, 2))}}


def test_tensors_that_fit() -> None:
    check_inputs(ROWS, "y", FOUND, Model("m"), 2)


@pytest.mark.parametrize(
    ("inputs", "says"),
    [
        ({"x": ("FP16", (-1, 3))}, "takes x as FP16"),
        ({"x": ("FP32", (-1, 4))}, r"takes x as \[-1, 4\]"),
        ({"x": ("FP32", (3,))}, r"takes x as \[3\]"),
        ({"z": ("FP32", (-1, 3))}, "takes z"),
        ({"x": ("FP32", (-1, 3)), "z": ("FP32", (1,))}, "takes x, z"),
    ],
)
def test_tensors_that_do_not_fit(inputs: Any, says: str) -> None:
    with pytest.raises(InputError, match=says):
        check_inputs(ROWS, "y", {**FOUND, "inputs": inputs}, Model("m"), 2)
    with pytest.raises(InputError, match="no output 'z'"):
        check_inputs(ROWS, "z", FOUND, Model("m"), 2)


REFERENCE = Reference(
    ROWS, {"base": np.eye(4, 2, dtype=np.float32) + 1, "pruned": np.ones((4, 2), np.float32)}, "y", 1e-4
)


def test_every_answer_is_compared_with_its_own_row() -> None:
    right = Traffic((1.0,) * 5, tuple((i, REFERENCE.outputs["base"][REFERENCE.rows(i, 1)]) for i in range(5)), 1.0)
    assert check_answers(right, REFERENCE, "base", 1, Model("m")) == 0
    shifted = Traffic((1.0,), ((1, REFERENCE.outputs["base"][REFERENCE.rows(0, 1)]),), 1.0)
    with pytest.raises(ParityError, match="answers differently from the base model"):
        check_answers(shifted, REFERENCE, "base", 1, Model("m"))


@pytest.mark.parametrize("answer", [np.full((1, 2), np.nan, np.float32), np.ones((1, 3), np.float32)])
def test_answers_that_are_no_numbers_or_of_another_shape(answer: np.ndarray) -> None:
    with pytest.raises(ParityError):
        check_answers(Traffic((1.0,), ((0, answer),), 1.0), REFERENCE, "pruned", 1, Model("m"))


@pytest.mark.parametrize("protocol", ["grpc", "http"])
def test_a_server_that_is_not_there(protocol: str) -> None:
    pytest.importorskip(f"tritonclient.{protocol}")
    (port,) = free_ports(1)
    connection = Connection(Url(protocol, f"{HOST}:{port}", False), 2.0)
    with pytest.raises(EnvironmentLacks) as caught:
        connection.ready(Model("m"))
    assert f"{HOST}:{port}" in str(caught.value) and "Traceback" not in str(caught.value)


@pytest.mark.parametrize("protocol", ["grpc", "http"])
def test_a_server_that_never_answers(protocol: str) -> None:
    pytest.importorskip(f"tritonclient.{protocol}")
    with socket.create_server((HOST, 0)) as silent:
        connection = Connection(Url(protocol, f"{HOST}:{silent.getsockname()[1]}", False), 0.5)
        with pytest.raises(EnvironmentLacks, match="did not answer within"):
            connection.server()


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--model", "a"], "1 models are named"),
        (["--model", "a:2", "--model", "a:2"], "a:2 would be compared with itself"),
        (["--model", "a", "--model", "b", "--blocks", "1"], "Invalid value for '--blocks'"),
        (["--model", "a", "--model", "b", "--concurrency", "1,x"], "Invalid value for '--concurrency'"),
        (["--model", "a", "--model", "b", "--concurrency", "1000"], "1000 is not in the range 1<=x<=256"),
        (["--model", "a", "--model", "b", "--seconds", "nan"], "'nan' is not a number"),
        (["--model", "a", "--model", "b", "--rate", "-1"], "Invalid value for '--rate'"),
    ],
)
def test_options_that_make_no_measurement(options: list[str], says: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["client", "127.0.0.1:1", *options]) == 2
    assert says in capsys.readouterr().err


def test_a_reference_that_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "x.safetensors").write_bytes(b"no")
    for name in ("x.safetensors", "none"):
        with pytest.raises(InputError, match="cannot read"):
            Reference.load(tmp_path / name, "y", 1e-4)
