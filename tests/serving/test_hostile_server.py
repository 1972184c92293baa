"""`client` against servers that answer anything: exit code 3 or 5 with three lines, in bounded time and memory."""

from __future__ import annotations

import contextlib
import gzip
import json
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from safetensors.numpy import save_file

from optin_export import cli
from tests.serving import hostile
from tests.serving.hostile import METADATA, as_json, dripping, endless, output, raw, said

TIMEOUT = 0.6
HEAD = b"HTTP/1.1 200 OK\r\n"
CHUNKED = HEAD + b"Transfer-Encoding: chunked\r\n\r\n"
LONG = HEAD + b"Content-Length: 900000000000\r\n\r\n"
BLOCK = b"x" * (1 << 16)
NESTED = b"[" * 200_000 + b"]" * 200_000
BOMB = gzip.compress(b" " * (64 << 20))
STATS: dict[str, Any] = {"inference_count": 1, "execution_count": 1, "inference_stats": {"success": {"count": 1}}}


def changed(**fields: Any) -> hostile.Answer:
    return as_json({**METADATA, **fields})


def tensor(**fields: Any) -> dict[str, Any]:
    return {"name": "y", "datatype": "FP32", "shape": [-1, 2], **fields}


def stats(**fields: Any) -> hostile.Answer:
    return as_json({"model_stats": [{**STATS, **fields}]})


#: name -> (what is answered instead, by the end of the path; '*' is everything).
HTTP: dict[str, dict[str, hostile.Answer]] = {
    "nonsense": {"*": raw(b"\x00\xffnonsense\r\n\r\n" * 10)},
    "closed": {"*": hostile.closing},
    "silent": {"*": hostile.silent},
    "status line only": {"*": raw(b"HTTP/1.1 200 OK\r\n")},
    "not found at all": {"*": said(b"nothing here", "404 Not Found")},
    "a server's own error": {"*": said(b"<html>oops</html>", "500 Internal Server Error")},
    "elsewhere": {"*": said(b"", "302 Found", "Location: http://127.0.0.1:1/\r\n")},
    "100 Continue for ever": {"*": endless(b"", b"HTTP/1.1 100 Continue\r\n\r\n" * 1000)},
    "headers without end": {"*": endless(HEAD, b"X-A: " + b"a" * 1000 + b"\r\n")},
    "one header without end": {"*": endless(HEAD + b"X-A: ", BLOCK)},
    "headers that drip": {"*": dripping(HEAD, b"X-A: b\r\n")},
    "metadata that drips": {"": dripping(HEAD + b"Content-Length: 100000\r\n\r\n")},
    "metadata without end": {"": endless(CHUNKED, b"10000\r\n" + BLOCK + b"\r\n")},
    "metadata of gigabytes": {"": endless(LONG, BLOCK)},
    "metadata cut off": {"": raw(HEAD + b"Content-Length: 1000\r\nConnection: close\r\n\r\n{")},
    "metadata twice as long as told": {"": raw(HEAD + b"Content-Length: 2\r\n\r\n{}{}{}{}")},
    "metadata is no JSON": {"": said(b"no")},
    "metadata is nested": {"": said(NESTED)},
    "metadata is a list": {"": as_json([1, 2])},
    "metadata is null": {"": as_json(None)},
    "metadata is no UTF-8": {"": said(b'{"name": "\xff\xfe"}')},
    "inputs are a number": {"": changed(inputs=3)},
    "inputs have no name": {"": changed(inputs=[{}])},
    "outputs without type": {"": changed(outputs=[{"name": "y"}])},
    "an output's name is a list": {"": changed(outputs=[tensor(name=["y"])])},
    "an output's name rings": {"": changed(outputs=[tensor(name="y\x1b]0;owned\x07")])},
    "a shape of text": {"": changed(outputs=[tensor(shape=["a", "b"])])},
    "a shape of 400 digits": {"": said(json.dumps(METADATA).replace("-1, 2", "9" * 400).encode())},
    "a million outputs": {"": changed(outputs=[{}] * 100_000)},
    "the server has no name": {"/v2": as_json({})},
    "the server's name is an object": {"/v2": as_json({"name": {}, "version": []})},
    "the server's name is a screen": {"/v2": as_json({"name": "\x1b[2J", "version": "1"})},
    "the answer is empty": {"/infer": said(b"")},
    "the answer is no JSON": {"/infer": said(b"\x80\x81")},
    "the answer has no outputs": {"/infer": as_json({})},
    "the answer has another output": {"/infer": output(name="z")},
    "outputs are null": {"/infer": as_json({"outputs": None})},
    "another shape": {"/infer": output(shape=[2, 1])},
    "a shape of petabytes": {"/infer": output(shape=[10**7, 10**8])},
    "a negative shape": {"/infer": output(shape=[-1, -2])},
    "text for numbers": {"/infer": output(datatype="BYTES", data=["a", "b"])},
    "a type that is none": {"/infer": output(datatype="FP31")},
    "data of text": {"/infer": output(data=["a", "b"])},
    "too little data": {"/infer": output(data=[1.0])},
    "NaN": {"/infer": said(b'{"outputs": [{"name":"y","datatype":"FP32","shape":[1,2],"data":[NaN, Infinity]}]}')},
    "a number of 400 digits": {"/infer": output(data=[10**400, 1])},
    "wrong numbers": {"/infer": output(data=[5.0, 5.0])},
    "binary data that is not there": {"/infer": output(parameters={"binary_data_size": 10**12})},
    "a header length without sense": {"/infer": said(b"{}", headers="Inference-Header-Content-Length: -5\r\n")},
    "a header length of gigabytes": {"/infer": said(b"{}", headers=f"Inference-Header-Content-Length: {10**12}\r\n")},
    "a header length of letters": {"/infer": said(b"{}", headers="Inference-Header-Content-Length: ab\r\n")},
    "a bomb": {"/infer": said(BOMB, headers="Content-Encoding: gzip\r\n")},
    "a bomb of metadata": {"": said(BOMB, headers="Content-Encoding: gzip\r\n")},
    "the answer drips": {"/infer": dripping(HEAD + b"Content-Length: 100000\r\n\r\n", b" ")},
    "the answer never ends": {"/infer": endless(CHUNKED, b"10000\r\n" + BLOCK + b"\r\n")},
    "statistics are a list": {"/stats": as_json([])},
    "statistics of text": {"/stats": stats(inference_count="many")},
    "statistics of 400 digits": {"/stats": stats(execution_count="9" * 400)},
    "statistics below zero": {"/stats": stats(inference_stats={"success": {"count": -5}})},
    "statistics without end": {"/stats": endless(CHUNKED, b"10000\r\n" + BLOCK + b"\r\n")},
}
#: Answers in the words of the protocol: the request is at fault.
REFUSED: dict[str, dict[str, hostile.Answer]] = {
    "an orderly refusal": {"/infer": said(b'{"error": "no such input"}', "400 Bad Request")},
}


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("reference") / "rows.safetensors"
    rows = {f"input.{name}": array for name, array in hostile.ROWS.items()}
    save_file({**rows, **{f"output.{which}": array for which, array in hostile.OUTPUTS.items()}}, path)
    # What the command imports is not to count as what a server's answer took.
    pytest.importorskip("tritonclient.http")
    with hostile.serving({"/infer": output(data=[5.0, 5.0])}) as port:
        ask(f"http://127.0.0.1:{port}", path)
    return path


def ask(url: str, reference: Path, *more: str) -> int:
    short = ["--timeout", str(TIMEOUT), "--blocks", "2", "--seconds", "0.02", "--no-open-loop", "--concurrency", "1"]
    return cli.main(["client", url, "--model", "a", "--model", "b", "--reference", str(reference), *short, *more])


@contextlib.contextmanager
def bounded(seconds: float = 10.0, growth: int = 100 << 20) -> Iterator[None]:
    """No body is waited for or held beyond reason."""
    begun, before = time.monotonic(), psutil.Process().memory_info().rss
    yield
    assert time.monotonic() - begun < seconds
    assert psutil.Process().memory_info().rss - before < growth


def three_lines(capsys: pytest.CaptureFixture[str]) -> str:
    error = capsys.readouterr().err
    assert "Traceback" not in error and error.replace("\n", "").isprintable()
    lines = error.splitlines()
    assert [line.split(":")[0].strip() for line in lines] == ["error", "why", "fix"], error
    return error


MEASURED = [(kind, ()) for kind in HTTP]
#: What is asked before the rows are sent is the same; and shadow traffic compares the models with each other only.
SHADOW = [(kind, ("--shadow",)) for kind, answers in HTTP.items() if "/infer" in answers and kind != "wrong numbers"]


@pytest.mark.parametrize(("kind", "more"), MEASURED + SHADOW)
def test_http(kind: str, more: tuple[str, ...], reference: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("tritonclient.http")
    answers = HTTP[kind]
    with hostile.serving(answers) as port, bounded():
        code = ask(f"http://127.0.0.1:{port}", reference, *more)
    three_lines(capsys)
    assert code in (3, 5)


@pytest.mark.parametrize("kind", REFUSED)
def test_a_refusal_names_the_request(kind: str, reference: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("tritonclient.http")
    with hostile.serving(REFUSED[kind]) as port:
        assert ask(f"http://127.0.0.1:{port}", reference) == 2
    assert "refused the request" in three_lines(capsys)


def test_the_fixture_is_understood(reference: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Otherwise every refusal above would be of something else."""
    pytest.importorskip("tritonclient.http")
    rows = {"/infer": output(data=[1.0, 1.0])}
    with hostile.serving(rows) as port:
        assert ask(f"http://127.0.0.1:{port}", reference, "--shadow") == 0
    assert "same largest value" in capsys.readouterr().out


WHATEVER = {
    "nonsense": raw(b"\x00\xff" * 100),
    "HTTP/1.1": said(b"hello"),
    "silent": hostile.silent,
    "closed": hostile.closing,
    "settings that drip": dripping(b"", b"\x00\x00\x00\x04\x00\x00\x00\x00\x00"),
    "settings without end": endless(b"", b"\x00\x00\x00\x04\x00\x00\x00\x00\x00" * 1000),
    "a frame of 16 MiB": endless(b"\x00\x00\x00\x04\x00\x00\x00\x00\x00\xff\xff\xff\x00\x00\x00\x00\x00\x01", BLOCK),
}


@pytest.mark.parametrize("protocol", ["grpc", "https", "grpcs"])
@pytest.mark.parametrize("kind", WHATEVER)
def test_what_is_no_such_protocol(
    protocol: str, kind: str, reference: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip(f"tritonclient.{protocol.rstrip('s')}")
    with hostile.serving(whatever=WHATEVER[kind]) as port, bounded():
        code = ask(f"{protocol}://127.0.0.1:{port}", reference)
    three_lines(capsys)
    assert code == 5


def grpc_answers() -> dict[str, dict[str, Any]]:
    """name -> {method: what it returns: a message, bytes, or a function of the call's context}."""
    from tritonclient.grpc import service_pb2 as messages

    def answered(**fields: Any) -> Any:
        one = {"name": "y", "datatype": "FP32", "shape": [1, 2], **fields}
        return messages.ModelInferResponse(
            outputs=[one], raw_output_contents=[np.array([[2, 1]], np.float32).tobytes()]
        )

    def late(context: Any) -> bytes:
        time.sleep(5)
        return b""

    def gone(context: Any) -> bytes:
        import grpc

        context.abort(grpc.StatusCode.INTERNAL, "\x1b[2Jowned")
        return b""

    big = messages.ModelInferResponse(raw_output_contents=[b"\0" * (3 << 20)])
    many = messages.ModelMetadataResponse(outputs=[{"name": "y"}] * 2000)
    bell = messages.ModelMetadataResponse(outputs=[{"name": "y\a", "datatype": "FP32"}])
    broken = answered()
    broken.raw_output_contents[0] = b"123"
    missing = answered()
    missing.ClearField("raw_output_contents")
    return {
        "no message": {"ModelMetadata": b"\xff\xff\xff\xff"},
        "never": {"ModelMetadata": late},
        "an internal error": {"ModelMetadata": gone},
        "no outputs": {"ModelMetadata": messages.ModelMetadataResponse()},
        "too many outputs": {"ModelMetadata": many},
        "a name that rings": {"ModelMetadata": bell},
        "a server without a name": {"ServerMetadata": messages.ServerMetadataResponse()},
        "an answer without outputs": {"ModelInfer": messages.ModelInferResponse()},
        "an answer that is no message": {"ModelInfer": b"\x00\x01\x02"},
        "an answer too large": {"ModelInfer": big},
        "another shape": {"ModelInfer": answered(shape=[2, 1])},
        "a shape of petabytes": {"ModelInfer": answered(shape=[10**9, 10**9])},
        "a negative shape": {"ModelInfer": answered(shape=[-1, 2])},
        "text": {"ModelInfer": answered(datatype="BYTES")},
        "no type": {"ModelInfer": answered(datatype="FP31")},
        "too few bytes": {"ModelInfer": broken},
        "no bytes": {"ModelInfer": missing},
        "another name": {"ModelInfer": answered(name="z")},
        "an answer that never comes": {"ModelInfer": late},
        "an answer that fails": {"ModelInfer": gone},
    }


@contextlib.contextmanager
def grpc_server(answers: dict[str, Any]) -> Iterator[int]:
    import grpc
    from tritonclient.grpc import service_pb2 as messages

    honest: dict[str, Any] = {
        "ServerLive": messages.ServerLiveResponse(live=True),
        "ModelReady": messages.ModelReadyResponse(ready=True),
        "ServerMetadata": messages.ServerMetadataResponse(name="hostile", version="1"),
        "ModelMetadata": messages.ModelMetadataResponse(
            inputs=[{"name": "x", "datatype": "FP32", "shape": [-1, 3]}],
            outputs=[{"name": "y", "datatype": "FP32", "shape": [-1, 2]}],
        ),
        "ModelStatistics": messages.ModelStatisticsResponse(),
        "ModelInfer": messages.ModelInferResponse(),
        **answers,
    }

    class Handler(grpc.GenericRpcHandler):  # type: ignore[misc]
        def service(self, details: Any) -> Any:
            found = honest[details.method.rpartition("/")[2]]

            def answer(request: bytes, context: Any) -> bytes:
                if callable(found):
                    return bytes(found(context))
                return found if isinstance(found, bytes) else bytes(found.SerializeToString())

            return grpc.unary_unary_rpc_method_handler(answer)

    server = grpc.server(ThreadPoolExecutor(4), options=[("grpc.so_reuseport", 0)])
    server.add_generic_rpc_handlers((Handler(),))
    port = server.add_insecure_port(f"{hostile.HOST}:0")
    server.start()
    try:
        yield port
    finally:
        server.stop(None)


KINDS = 20


@pytest.mark.parametrize("number", range(KINDS))
def test_grpc(number: int, reference: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("tritonclient.grpc")
    kinds = list(grpc_answers().items())
    assert len(kinds) == KINDS
    name, answers = kinds[number]
    with grpc_server(answers) as port, bounded():
        code = ask(f"grpc://127.0.0.1:{port}", reference)
    assert three_lines(capsys), name
    # Models without outputs, or with an output of another name, are the wrong models.
    assert code in (3, 5) or (code == 2 and answers.keys() == {"ModelMetadata"}), name
