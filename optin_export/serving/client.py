"""A client of a served model over KServe v2, by gRPC or HTTP (tritonclient): send requests, read statistics.

It connects only to the given address: no proxies, no redirects.
"""

from __future__ import annotations

import contextlib
import importlib
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from optin_export.errors import EnvironmentLacks, InputError, OptinError, ParityError, missing_package
from optin_export.serving.bounded_http import DESCRIPTION, bounded_client

Arrays = Mapping[str, np.ndarray]
Request = list[Any]
_SCHEMES = {"grpc": ("grpc", False), "grpcs": ("grpc", True), "http": ("http", False), "https": ("http", True)}
#: No proxy, separate connections, and no decompression: a few bytes could expand to gigabytes.
_CHANNEL = [
    ("grpc.max_send_message_length", 2**31 - 1),
    ("grpc.enable_http_proxy", 0),
    ("grpc.use_local_subchannel_pool", 1),
    ("grpc.per_message_decompression", 0),
    ("grpc.enable_deadline_checking", 1),
]
#: Maximum bytes per value of an answer: JSON writes a float32 in at most 25 characters.
_BYTES_PER_VALUE = 32
#: Maximum number of inputs or outputs of a model, and of characters in a name.
MOST_TENSORS, MOST_NAME = 1000, 500
_NUMPY = {"FP32": "float32", "FP64": "float64", "FP16": "float16", "INT64": "int64", "INT32": "int32", "INT8": "int8"}
_NUMPY |= {"UINT8": "uint8", "BOOL": "bool", "INT16": "int16"}
_SHIP_AGAIN = "ship the run again"


@dataclass(frozen=True)
class Url:
    """protocol: 'grpc' or 'http'. address: host:port."""

    protocol: str
    address: str
    secure: bool

    @classmethod
    def parse(cls, text: str) -> Url:
        """`grpc://host:8001`, `http://host:8000`, the same with s, or host:port (gRPC). Raises InputError."""
        scheme, _, rest = text.rpartition("://")
        address = rest.rstrip("/")
        found = re.fullmatch(r"(\[[0-9a-fA-F:.]+\]|[\w.-]+):(\d{1,5})", address, re.ASCII)
        if (scheme or "grpc") not in _SCHEMES or found is None or int(found[2]) >= 1 << 16:
            raise InputError(
                f"'{text}' is not the address of a server",
                "it is not SCHEME://HOST:PORT with grpc, grpcs, http or https",
                "write for instance grpc://127.0.0.1:8001",
            )
        return cls(_SCHEMES[scheme or "grpc"][0], address, _SCHEMES[scheme or "grpc"][1])

    def __str__(self) -> str:
        return f"{self.protocol}{'s' if self.secure else ''}://{self.address}"


@dataclass(frozen=True)
class Model:
    """A served model, `NAME` or `NAME:VERSION`."""

    name: str
    version: str = ""

    @classmethod
    def parse(cls, text: str) -> Model:
        name, _, version = text.partition(":")
        if not name or (version and not version.isdigit()):
            raise InputError(f"'{text}' is not a served model", "it is not NAME or NAME:VERSION", "correct --model")
        return cls(name, version)

    def __str__(self) -> str:
        return self.name + (f":{self.version}" if self.version else "")


@dataclass(frozen=True)
class Counters:
    """Totals of a model since the server started. Times in nanoseconds; rows: inferences; batches: executions."""

    requests: int
    failures: int
    rows: int
    batches: int
    queue: int
    compute: int

    def since(self, before: Counters) -> Counters:
        return Counters(*(now - then for now, then in zip(vars(self).values(), vars(before).values(), strict=True)))


class Connection:
    """One connection, for one thread. timeout: seconds that any answer may take as a whole.

    shape: the shape of answers that `infer` accepts; more bytes than such an answer can have are not read.
    """

    def __init__(self, url: Url, timeout: float, shape: tuple[int, ...] = ()) -> None:
        self.url, self.timeout, self.shape = url, timeout, shape
        self._module = _import(url.protocol)
        self._most = DESCRIPTION + _BYTES_PER_VALUE * math.prod(shape)
        if url.protocol == "grpc":
            channel = [*_CHANNEL, ("grpc.max_receive_message_length", min(self._most, 2**31 - 1))]
            self._client = self._module.InferenceServerClient(url.address, ssl=url.secure, channel_args=channel)
            self._limits: dict[str, Any] = {"client_timeout": timeout}
        else:
            self._client = bounded_client(url.address, url.secure, timeout)
            self._limits = {}

    def close(self) -> None:
        self._client.close()

    @contextlib.contextmanager
    def _asking(self, doing: str) -> Iterator[None]:
        """A context for every request and for reading its answer: nothing that a server sends is trusted."""
        try:
            with contextlib.nullcontext() if self._limits else self._client.within(self.timeout, self._most):
                yield
        except OptinError:
            raise
        except Exception as error:  # each protocol raises its own types, and malformed answers raise any type
            raise self._refusal(error, doing) from None

    def infer(self, model: Model, request: Request, output: str) -> np.ndarray:
        """The output of one request, of the connection's shape.

        Raises ParityError for an answer of another shape or type, and otherwise an OptinError that says whether the
        server or the request is at fault.
        """
        with self._asking(f"asking {model}"):
            answer = self._client.infer(
                model.name,
                request,
                model_version=model.version,
                outputs=[self._module.InferRequestedOutput(output)],
                **self._limits,
            )
            metadata = answer.get_output(output)
            if metadata is None:
                raise ParityError(f"{model} does not return '{output}'", "its answer has no such output", _SHIP_AGAIN)
            kind, shape = _described(metadata if isinstance(metadata, dict) else _as_dict(metadata))
            if kind not in _NUMPY or shape != self.shape:
                raise ParityError(
                    f"{model} answered with {kind} of shape {list(shape)[:8]}",
                    f"expected numbers of shape {list(self.shape)}",
                    _SHIP_AGAIN,
                )
            array: np.ndarray = np.asarray(answer.as_numpy(output))
            if array.dtype.kind not in "fiub" or array.shape != self.shape:
                raise ValueError("its numbers do not fit its shape")
            return array
        raise AssertionError  # the body returns or raises

    def ready(self, model: Model) -> None:
        """Raises EnvironmentLacks unless the server is reachable and the model is ready."""
        with self._asking("asking for its state"):
            if not self._client.is_server_live(**self._limits):
                raise EnvironmentLacks(
                    f"the server at {self.url} is not live", "the server reports it", "wait, or see its log"
                )
        with self._asking("asking for its state"):
            served = self._client.is_model_ready(model.name, model.version, **self._limits)
        if not served:
            raise EnvironmentLacks(
                f"the model {model} is not ready at {self.url}",
                "it is not in the repository, still loading, or could not be loaded",
                "see the server's log, and the names that `optin-export ship` printed",
            )

    def metadata(self, model: Model) -> dict[str, dict[str, tuple[str, tuple[int, ...]]]]:
        """{'inputs' and 'outputs': {name: (KServe type, dims)}}; -1 is any size."""
        with self._asking(f"asking what {model} takes"):
            found = self._client.get_model_metadata(model.name, model.version, **self._as_json())
            if any(len(found[kind]) > MOST_TENSORS for kind in ("inputs", "outputs")):
                raise ValueError(f"it lists more than {MOST_TENSORS} inputs or outputs")
            return {
                kind: {_text(one["name"]): _described(one) for one in found[kind]} for kind in ("inputs", "outputs")
            }
        raise AssertionError

    def server(self) -> str:
        """Name and version of the server."""
        with self._asking("asking for its version"):
            found = self._client.get_server_metadata(**self._as_json())
            return f"{_text(found['name'])} {_text(found['version'])}"
        raise AssertionError

    def counters(self, model: Model) -> Counters | None:
        """The model's totals, over its versions unless one is named; None from a server without statistics."""
        with self._asking("reading its statistics"):
            try:
                found = self._client.get_inference_statistics(model.name, model.version, **self._as_json())
            except Exception as error:
                if _unimplemented(error):
                    return None  # KServe v2 itself has no statistics: they are an extension of Triton
                raise
            entries = found["model_stats"] if self.url.protocol == "http" else found.get("model_stats", ())
            # Counts are strings if protobuf wrote the JSON, which also omits zeros.
            return Counters(
                requests=sum(_number(one, "success", "count") for one in entries),
                failures=sum(_number(one, "fail", "count") for one in entries),
                rows=sum(_count(one.get("inference_count", 0)) for one in entries),
                batches=sum(_count(one.get("execution_count", 0)) for one in entries),
                queue=sum(_number(one, "queue", "ns") for one in entries),
                compute=sum(_number(one, "compute_infer", "ns") for one in entries),
            )
        raise AssertionError

    def _as_json(self) -> dict[str, Any]:
        return {**self._limits, **({"as_json": True} if self.url.protocol == "grpc" else {})}

    def _refusal(self, error: Exception, doing: str) -> OptinError:
        text = " ".join((str(error) or type(error).__name__).split())[:300]
        status = str(getattr(error, "status", lambda: "")() or "")
        if "DEADLINE_EXCEEDED" in status or "timed out" in text.lower() or isinstance(error, TimeoutError):
            return EnvironmentLacks(
                f"{self.url} did not answer within {self.timeout:g} s, {doing}",
                text,
                "wait longer with --timeout, or send smaller requests",
            )
        # A refusal in the protocol's format is about the request; in any other format it is not from such a server.
        in_order = "an exception occurred in the client" not in text
        if in_order and ("INVALID_ARGUMENT" in status or "NOT_FOUND" in status or status.startswith("4")):
            return InputError(f"{self.url} refused the request, {doing}", text, "check the model's name and inputs")
        said = text if status or isinstance(error, OSError) else f"its answer cannot be used: {text}"
        why = f"{status}: {said}" if status and status not in said else said
        return EnvironmentLacks(
            f"the server at {self.url} failed, {doing}", why, "check that it still runs, and read its log"
        )


def prepare(url: Url, inputs: Arrays) -> Request:
    """A request that can be sent many times, from any thread."""
    module, entries = _import(url.protocol), []
    for name, array in inputs.items():
        kind = next(triton for triton, numpy in _NUMPY.items() if numpy == array.dtype.name)
        entry = module.InferInput(name, list(array.shape), kind)
        entry.set_data_from_numpy(np.ascontiguousarray(array))
        entries.append(entry)
    return entries


def check_inputs(given: Arrays, output: str, found: Mapping[str, Mapping[str, Any]], model: Model, rows: int) -> None:
    """Raises InputError if the model takes other inputs than the given rows, or has no such output.

    found: `Connection.metadata`. rows: rows per request.
    """
    fix = "serve the models of this run, or give the run that they come from"
    if set(given) != set(found["inputs"]):
        raise InputError(
            f"{model} takes {', '.join(sorted(found['inputs']))}",
            f"the run's rows have {', '.join(sorted(given))}",
            fix,
        )
    for name, array in given.items():
        kind, dims = found["inputs"][name]
        if _NUMPY.get(kind) != array.dtype.name:
            raise InputError(f"{model} takes {name} as {kind}", f"the run's rows have {array.dtype.name}", fix)
        shape = (rows, *array.shape[1:])
        if len(dims) != len(shape) or any(dim not in (-1, size) for dim, size in zip(dims, shape, strict=True)):
            raise InputError(f"{model} takes {name} as {list(dims)}", f"the run's rows are {list(shape)}", fix)
    if output not in found["outputs"]:
        raise InputError(f"{model} has no output '{output}'", f"it has {', '.join(found['outputs'])}", fix)


def _described(one: Mapping[str, Any]) -> tuple[str, tuple[int, ...]]:
    """(KServe type, dims) of a tensor as a server describes it. Raises ValueError, TypeError or KeyError."""
    dims = tuple(int(dim) for dim in one.get("shape", ()))
    if len(dims) > 32 or any(not -1 <= dim < 2**40 for dim in dims):
        raise ValueError("its shape is not valid")
    return _text(one["datatype"]), dims


def _as_dict(metadata: Any) -> dict[str, Any]:
    return {"datatype": metadata.datatype, "shape": list(metadata.shape)}


def _unimplemented(error: Exception) -> bool:
    status = str(getattr(error, "status", lambda: "")() or "")
    return "UNIMPLEMENTED" in status or "Unimplemented" in str(error) or status == "404"


def _text(value: Any) -> str:
    if not isinstance(value, str) or len(value) > MOST_NAME or not value.isprintable():
        raise ValueError("a name in it is not a single line of text")
    return value


def _count(value: Any) -> int:
    number = int(value)
    if not 0 <= number < 2**63:
        raise ValueError("a count in it is out of range")
    return number


def _number(entry: Mapping[str, Any], part: str, field: str) -> int:
    return _count(entry.get("inference_stats", {}).get(part, {}).get(field, 0))


def _import(protocol: str) -> Any:
    try:
        return importlib.import_module(f"tritonclient.{protocol}")
    except (ImportError, RuntimeError):  # tritonclient raises RuntimeError where gevent is missing
        raise missing_package(f"tritonclient[{protocol}]", "measuring a served model", "triton") from None
