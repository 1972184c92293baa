"""tritonclient's HTTP client with limits for the time and the size of a whole answer.

tritonclient has a time-out only for each read, so it reads forever from a server that sends one byte a second, and it
reads a body of any length into memory. Here the limits apply to the socket, below everything that reads from it.
"""

from __future__ import annotations

import contextlib
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

#: Maximum bytes of one read, whatever length a header announces.
BLOCK = 1 << 16
#: Maximum bytes of headers, and of JSON that describes a model or a server.
DESCRIPTION = 1 << 20


class TooMuch(Exception):
    """The server sent more bytes than its answer can have."""


class Budget:
    """The remaining budget of one answer: seconds until a deadline, and bytes."""

    def __init__(self) -> None:
        self.end, self.bytes, self.limit = 0.0, 0, 0

    def begin(self, seconds: float, limit: int) -> None:
        self.end, self.bytes, self.limit = time.monotonic() + seconds, 0, limit

    def seconds(self) -> float:
        """The remaining seconds. Raises TimeoutError if there are none."""
        left = self.end - time.monotonic()
        if left <= 0:
            raise TimeoutError("timed out: the answer did not end")
        return left

    def received(self, count: int) -> None:
        self.bytes += count
        if self.bytes > self.limit:
            raise TooMuch(f"it sent more than {self.limit} bytes")


class BoundedSocket:
    """A connected socket that reads and writes within a budget, and delegates everything else."""

    def __init__(self, connected: Any, budget: Budget) -> None:
        self._socket, self._budget = connected, budget

    def recv(self, size: int, *flags: int) -> bytes:
        self._socket.settimeout(self._budget.seconds())
        data: bytes = self._socket.recv(min(size, BLOCK), *flags)
        self._budget.received(len(data))
        return data

    def sendall(self, data: Any, *flags: int) -> None:
        self._socket.settimeout(self._budget.seconds())
        self._socket.sendall(data, *flags)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._socket, name)


def bounded_client(address: str, secure: bool, timeout: float) -> Any:
    """An `InferenceServerClient` of tritonclient.http for one thread; its requests belong within `client.within(...)`.

    Compressed answers are refused: nothing here asks for them, and a few bytes could expand to gigabytes.
    """
    import gevent
    from tritonclient.http import InferenceServerClient

    class BoundedClient(InferenceServerClient):
        def __init__(self) -> None:
            super().__init__(address, ssl=secure, connection_timeout=timeout, network_timeout=timeout)
            self.budget = Budget()
            pool = self._client_stub._connection_pool
            connect = pool._connect_socket
            pool._connect_socket = lambda *given: BoundedSocket(connect(*given), self.budget)

        @contextlib.contextmanager
        def within(self, seconds: float, limit: int) -> Iterator[None]:
            """Limit the time (TimeoutError) and the size in bytes (TooMuch) of requests in the body."""
            self.budget.begin(seconds, limit)
            # Name lookup and the TLS handshake precede the socket on which a time-out can be set.
            guard = gevent.Timeout(seconds)
            try:
                with guard:
                    yield
            except gevent.Timeout as late:
                if late is not guard:
                    raise
                raise TimeoutError("timed out") from None

        def _get(self, *given: Any, **named: Any) -> Any:
            return _plain(super()._get(*given, **named))

        def _post(self, *given: Any, **named: Any) -> Any:
            return _plain(super()._post(*given, **named))

    client = BoundedClient()
    _this_thread.__dict__.setdefault("clients", []).append(client)
    return client


_this_thread = threading.local()


def end_of_thread() -> None:
    """Close the clients that the calling thread made, and free what gevent keeps for it.

    A thread other than the main one calls it last. gevent gives every thread that waits a hub with a pool of further
    threads for looking up names; these outlive the thread, and Python crashes where a hub is collected by another one.
    Does nothing in a thread that made no client.
    """
    for client in _this_thread.__dict__.pop("clients", ()):
        client.close()
    local = sys.modules.get("gevent._hub_local")
    hub = local.get_hub_if_exists() if local is not None else None
    if hub is not None:
        hub.destroy(destroy_loop=True)


def _plain(response: Any) -> Any:
    encoding = response.get("Content-Encoding")
    if encoding not in (None, "identity"):
        response.release()
        raise ValueError(f"its answer is compressed ({str(encoding)[:40]})")
    return response
