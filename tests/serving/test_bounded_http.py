"""Threads that ask a server leave nothing behind when they end."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from optin_export.serving.client import Connection, Model, Url
from optin_export.serving.traffic import Send, closed_loop

pytest.importorskip("tritonclient.http")


class Live(BaseHTTPRequestHandler):
    """Answers everything with an empty 200."""

    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self.send_response(200)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *given: object) -> None: ...


@pytest.fixture
def url() -> Iterator[Url]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Live)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield Url.parse(f"http://localhost:{server.server_port}")
    server.shutdown()
    server.server_close()
    thread.join()


def threads_of_gevent() -> int:
    """Native threads of this process: Python's own, and those that gevent starts without telling `threading`."""
    known = {str(thread.native_id) for thread in threading.enumerate()}
    return len({path.name for path in Path("/proc/self/task").iterdir()} - known)


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="threads are counted in /proc")
def test_no_thread_outlives_the_thread_that_asked(url: Url) -> None:
    def connect() -> Send:
        connection = Connection(url, 10.0)
        return lambda number: connection.ready(Model("m"))

    def block() -> int:
        done = closed_loop(connect, 4, 0.05)
        assert done.answers
        return threads_of_gevent()

    first = block()
    for _ in range(4):
        block()
    end = time.monotonic() + 20
    while threads_of_gevent() > first and time.monotonic() < end:
        time.sleep(0.05)  # they are told to end, and do so by themselves
    assert threads_of_gevent() <= first
