"""A client of a served model over KServe v2, by gRPC or HTTP (tritonclient): ask, be answered, read the statistics.

Only the address that was given is ever connected to: no proxies, no redirects, nothing else.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from optin_export.errors import EnvironmentLacks, InputError, OptinError, missing_package

Arrays = Mapping[str, np.ndarray]
Request = list[Any]
_SCHEMES = {"grpc": ("grpc", False), "grpcs": ("grpc", True), "http": ("http", False), "https": ("http", True)}
#: As tritonclient sets them where no channel arguments are given; and no proxy, and a connection of its own each.
_CHANNEL = [
    ("grpc.max_send_message_length", 2**31 - 1),
    ("grpc.max_receive_message_length", 2**31 - 1),
    ("grpc.enable_http_proxy", 0),
    ("grpc.use_local_subchannel_pool", 1),
]
_NUMPY = {"FP32": "float32", "FP64": "float64", "FP16": "float16", "INT64": "int64", "INT32": "int32", "INT8": "int8"}
_NUMPY |= {"UINT8": "uint8", "BOOL": "bool", "INT16": "int16"}


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
        if (scheme or "grpc") not in _SCHEMES or not re.fullmatch(r"(\[[0-9a-fA-F:.]+\]|[\w.-]+):\d{1,5}", address):
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
            raise InputError(f"'{text}' names no served model", "it is not NAME or NAME:VERSION", "correct --model")
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
    """One connection, for one thread. timeout: seconds that any answer may take."""

    def __init__(self, url: Url, timeout: float) -> None:
        self.url, self.timeout = url, timeout
        self._module = _import(url.protocol)
        if url.protocol == "grpc":
            self._client = self._module.InferenceServerClient(url.address, ssl=url.secure, channel_args=_CHANNEL)
            self._limits: dict[str, Any] = {"client_timeout": timeout}
        else:
            self._client = self._module.InferenceServerClient(
                url.address, ssl=url.secure, connection_timeout=timeout, network_timeout=timeout
            )
            self._limits = {}

    def close(self) -> None:
        self._client.close()

    def infer(self, model: Model, request: Request, output: str) -> np.ndarray:
        """The output of one request. Raises an OptinError that says whether the server or the request is at fault."""
        try:
            answer = self._client.infer(
                model.name,
                request,
                model_version=model.version,
                outputs=[self._module.InferRequestedOutput(output)],
                **self._limits,
            ).as_numpy(output)
        except Exception as error:  # each protocol raises its own types
            raise self._refusal(error, f"asking {model}") from None
        return np.asarray(answer)

    def ready(self, model: Model) -> None:
        """Raises EnvironmentLacks unless the server is there and the model can be asked."""
        try:
            if not self._client.is_server_live(**self._limits):
                raise EnvironmentLacks(
                    f"the server at {self.url} is not live", "it says so itself", "wait, or see its log"
                )
            served = self._client.is_model_ready(model.name, model.version, **self._limits)
        except OptinError:
            raise
        except Exception as error:
            raise self._refusal(error, "asking for its state") from None
        if not served:
            raise EnvironmentLacks(
                f"the model {model} is not ready at {self.url}",
                "it is not in the repository, still loading, or could not be loaded",
                "see the server's log, and the names that `optin-export ship` printed",
            )

    def metadata(self, model: Model) -> dict[str, dict[str, tuple[str, tuple[int, ...]]]]:
        """{'inputs' and 'outputs': {name: (KServe type, dims)}}; -1 is any size."""
        try:
            options = dict(self._limits, **({"as_json": True} if self.url.protocol == "grpc" else {}))
            found = self._client.get_model_metadata(model.name, model.version, **options)
        except Exception as error:
            raise self._refusal(error, f"asking what {model} takes") from None
        return {
            kind: {one["name"]: (one["datatype"], tuple(int(d) for d in one.get("shape", ()))) for one in found[kind]}
            for kind in ("inputs", "outputs")
        }

    def server(self) -> str:
        """Name and version of the server."""
        try:
            options = dict(self._limits, **({"as_json": True} if self.url.protocol == "grpc" else {}))
            found = self._client.get_server_metadata(**options)
        except Exception as error:
            raise self._refusal(error, "asking for its version") from None
        return f"{found['name']} {found['version']}"

    def counters(self, model: Model) -> Counters | None:
        """The model's totals, over its versions unless one is named; None from a server without statistics."""
        try:
            options = dict(self._limits, **({"as_json": True} if self.url.protocol == "grpc" else {}))
            found = self._client.get_inference_statistics(model.name, model.version, **options)
        except Exception as error:
            if "Unimplemented" in str(error) or "UNIMPLEMENTED" in str(error) or "404" in str(error):
                return None  # KServe v2 itself has none: they are an extension of Triton
            raise self._refusal(error, "reading its statistics") from None
        entries = found["model_stats"]
        # Counts come as text where protobuf wrote the JSON; what is zero is left out there.
        total = {
            "requests": sum(_number(one, "success", "count") for one in entries),
            "failures": sum(_number(one, "fail", "count") for one in entries),
            "queue": sum(_number(one, "queue", "ns") for one in entries),
            "compute": sum(_number(one, "compute_infer", "ns") for one in entries),
        }
        rows = sum(int(one.get("inference_count", 0)) for one in entries)
        batches = sum(int(one.get("execution_count", 0)) for one in entries)
        return Counters(total["requests"], total["failures"], rows, batches, total["queue"], total["compute"])

    def _refusal(self, error: Exception, doing: str) -> OptinError:
        text = " ".join((str(error) or type(error).__name__).split())[:300]
        status = str(getattr(error, "status", lambda: "")() or "")
        late = "DEADLINE_EXCEEDED" in status or "timed out" in text.lower() or isinstance(error, TimeoutError)
        if late:
            return EnvironmentLacks(
                f"{self.url} did not answer within {self.timeout:g} s, {doing}",
                text,
                "wait longer with --timeout, or ask for less at a time",
            )
        if "INVALID_ARGUMENT" in status or "NOT_FOUND" in status or status.startswith("4"):
            return InputError(f"{self.url} refused the request, {doing}", text, "check the model's name and inputs")
        return EnvironmentLacks(
            f"the server at {self.url} failed, {doing}", text, "see whether it still runs, and its log"
        )


def prepare(url: Url, inputs: Arrays) -> Request:
    """A request that can be sent many times, by any thread."""
    module, entries = _import(url.protocol), []
    for name, array in inputs.items():
        kind = next(triton for triton, numpy in _NUMPY.items() if numpy == array.dtype.name)
        entry = module.InferInput(name, list(array.shape), kind)
        entry.set_data_from_numpy(np.ascontiguousarray(array))
        entries.append(entry)
    return entries


def check_inputs(given: Arrays, output: str, found: Mapping[str, Mapping[str, Any]], model: Model, rows: int) -> None:
    """Raises InputError where the model takes other inputs than the rows at hand, or has no such output.

    found: `Connection.metadata`. rows: per request.
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


def _number(entry: Mapping[str, Any], part: str, field: str) -> int:
    return int(entry.get("inference_stats", {}).get(part, {}).get(field, 0))


def _import(protocol: str) -> Any:
    try:
        return importlib.import_module(f"tritonclient.{protocol}")
    except (ImportError, RuntimeError):  # tritonclient raises RuntimeError where gevent is missing
        raise missing_package(f"tritonclient[{protocol}]", "measuring a served model", "triton") from None
