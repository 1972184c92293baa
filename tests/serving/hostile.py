"""A server on the loopback that answers as KServe v2 does, except where it is told to answer something else.

`Answer`: a function that is given the connection and writes what it likes. Everything ends with the connection.
"""

from __future__ import annotations

import contextlib
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np

HOST = "127.0.0.1"
Answer = Callable[[socket.socket], None]
ROWS = {"x": np.zeros((4, 3), np.float32)}
OUTPUTS = {"base": np.eye(4, 2, dtype=np.float32) + 1, "pruned": np.ones((4, 2), np.float32)}
#: What a server may send in one test at most, should the client never stop it.
MOST = 1 << 30

METADATA = {
    "name": "m",
    "versions": ["1"],
    "platform": "none",
    "inputs": [{"name": "x", "datatype": "FP32", "shape": [-1, 3]}],
    "outputs": [{"name": "y", "datatype": "FP32", "shape": [-1, 2]}],
}


def said(body: bytes, status: str = "200 OK", headers: str = "") -> Answer:
    head = f"HTTP/1.1 {status}\r\nContent-Length: {len(body)}\r\n{headers}\r\n".encode()
    return lambda connection: connection.sendall(head + body)


def as_json(value: Any, **more: Any) -> Answer:
    return said(json.dumps(value).encode(), **more)


def output(**fields: Any) -> Answer:
    """An answer to a request for one row; by default the right one for the unpruned model's first row."""
    one = {"name": "y", "datatype": "FP32", "shape": [1, 2], "data": [2.0, 1.0], **fields}
    return as_json({"model_name": "m", "model_version": "1", "outputs": [one]})


def raw(*parts: bytes) -> Answer:
    return lambda connection: [connection.sendall(part) for part in parts] and None


def dripping(head: bytes, part: bytes = b"x", pause: float = 0.05) -> Answer:
    """Never late for a single read, and never done."""

    def answer(connection: socket.socket) -> None:
        connection.sendall(head)
        for _ in range(2000):
            time.sleep(pause)
            connection.sendall(part)

    return answer


def endless(head: bytes, part: bytes) -> Answer:
    def answer(connection: socket.socket) -> None:
        connection.sendall(head)
        for _ in range(MOST // len(part)):
            connection.sendall(part)

    return answer


def silent(connection: socket.socket) -> None:
    time.sleep(20)


def closing(connection: socket.socket) -> None:
    connection.shutdown(socket.SHUT_RDWR)


OK = said(b"")
#: By the end of the path.
HONEST: dict[str, Answer] = {
    "/v2": as_json({"name": "hostile", "version": "1", "extensions": []}),
    "/ready": OK,
    "/live": OK,
    "/stats": said(b'{"error": "none"}', "404 Not Found"),
    "/infer": output(),
    "": as_json(METADATA),
}


class Server:
    """Answers on `url` with `answers` by the end of the path, and honestly otherwise. `raw`: to whatever is sent."""

    def __init__(self, answers: Mapping[str, Answer], whatever: Answer | None = None) -> None:
        self.answers, self.whatever = {**answers}, whatever
        self.socket = socket.create_server((HOST, 0))
        self.port: int = self.socket.getsockname()[1]
        self.open: list[socket.socket] = []
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                connection, _ = self.socket.accept()
                self.open.append(connection)
                threading.Thread(target=self._serve, args=(connection,), daemon=True).start()

    def _serve(self, connection: socket.socket) -> None:
        with contextlib.suppress(OSError), connection:
            while True:
                if self.whatever is not None:
                    connection.recv(1 << 16)
                    self.whatever(connection)
                    return
                path = self._request(connection)
                if path is None:
                    return
                known = {**HONEST, **self.answers}
                every = self.answers.get("*")
                end = max((end for end in known if end != "*" and path.endswith(end)), key=len)
                (every or known[end])(connection)

    def _request(self, connection: socket.socket) -> str | None:
        data = b""
        while b"\r\n\r\n" not in data:
            part = connection.recv(1 << 16)
            if not part:
                return None
            data += part
        head, _, body = data.partition(b"\r\n\r\n")
        length = next(
            (int(line[15:]) for line in head.split(b"\r\n") if line.lower().startswith(b"content-length:")), 0
        )
        while len(body) < length:
            body += connection.recv(1 << 16)
        return head.split()[1].decode()

    def close(self) -> None:
        for one in (self.socket, *self.open):
            with contextlib.suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)
            one.close()


@contextlib.contextmanager
def serving(answers: Mapping[str, Answer] | None = None, whatever: Answer | None = None) -> Iterator[int]:
    """The port."""
    server = Server(answers or {}, whatever)
    try:
        yield server.port
    finally:
        server.close()
