"""Find, start on loopback, await and stop a tritonserver on this machine, to try a run out.

A server in a container has its backends installed. The one in the package nvidia-pytriton has only the python backend,
whose folder is assembled here from the package's parts.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from optin_export.errors import EnvironmentLacks, InputError

#: Environment variable that names a virtual environment with nvidia-pytriton in it.
ENVIRONMENT = "OPTIN_EXPORT_TRITON"
PYTRITON = "nvidia-pytriton==0.7.0"
#: How to get a server without Docker; the environment is one of its own because the package needs numpy below 2.
PIP_LINES = ("python3 -m venv triton-venv", f"triton-venv/bin/pip install {PYTRITON} onnxruntime tokenizers pillow")
HOST = "127.0.0.1"


@dataclass(frozen=True)
class Program:
    """A tritonserver. environment: the virtual environment whose parts it needs; None for a standalone one."""

    binary: Path
    environment: Path | None = None

    def backends(self) -> list[str]:
        """Names of its backends."""
        if self.environment is not None:
            return ["python"]
        folder = self.binary.resolve().parent.parent / "backends"
        return sorted(path.name for path in folder.glob("*") if path.is_dir())


@dataclass(frozen=True)
class Server:
    """A running server. log: the file of its output."""

    process: subprocess.Popen[bytes]
    http: str
    grpc: str
    metrics: str
    log: Path

    def reason(self) -> str:
        """The last line in its log that looks like an error."""
        lines = self.log.read_text(encoding="utf-8", errors="replace").splitlines()
        wrong = [line for line in lines if line.startswith("E") or "error" in line.lower()]
        return " ".join((wrong or lines or ["it said nothing"])[-1].split())[:400]


def find(environment: str | Path | None = None) -> Program:
    """The server of a virtual environment (given, or named by OPTIN_EXPORT_TRITON), or the one on PATH.

    Raises EnvironmentLacks with the lines that get one.
    """
    place = environment or os.environ.get(ENVIRONMENT)
    if place:
        found = sorted(Path(place).glob("lib/python3*/site-packages/pytriton/tritonserver/bin/tritonserver"))
        if not found:
            raise EnvironmentLacks(
                f"there is no tritonserver in {place}", "nvidia-pytriton is not installed there", "; ".join(PIP_LINES)
            )
        return Program(found[0], Path(place).resolve())
    on_path = shutil.which("tritonserver")
    if on_path is None:
        raise EnvironmentLacks(
            "there is no tritonserver on this machine",
            f"none on PATH, and {ENVIRONMENT} names no environment with nvidia-pytriton",
            f"{'; '.join(PIP_LINES)}; export {ENVIRONMENT}=$PWD/triton-venv   (with a GPU: the docker line of "
            "`optin-export ship`)",
        )
    return Program(Path(on_path))


def can_import(program: Program, module: str) -> bool:
    """Whether the Python of the server's python backend has a module."""
    python = program.environment / "bin" / "python" if program.environment is not None else shutil.which("python3")
    if python is None:
        return False
    try:
        return subprocess.run([python, "-c", f"import {module}"], capture_output=True, timeout=60).returncode == 0
    except (OSError, subprocess.SubprocessError):
        return False


def free_ports(count: int) -> list[int]:
    """Loopback ports that are currently free."""
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind((HOST, 0))
        return [int(one.getsockname()[1]) for one in sockets]


@contextlib.contextmanager
def running(
    program: Program,
    repository: Path,
    ports: Sequence[int] | None = None,
    *,
    ready_seconds: float = 120.0,
    arguments: Sequence[str] = (),
) -> Iterator[Server]:
    """A server for `repository` on loopback, ready; stopped when the block ends. ports: of HTTP, gRPC and metrics.

    Raises InputError for a used port, EnvironmentLacks if the server dies or is not ready in time.
    """
    http, grpc, metrics = ports or free_ports(3)
    for port in (http, grpc, metrics):
        _refuse_taken(port)
    with tempfile.TemporaryDirectory(prefix="optin-export-triton-") as scratch:
        command, variables = _command(program, Path(scratch))
        command += [f"--model-repository={repository}", "--exit-on-error=true", *arguments]
        for name, port in (("http", http), ("grpc", grpc), ("metrics", metrics)):
            command += [f"--{name}-address={HOST}", f"--{name}-port={port}"]
        log = Path(scratch) / "log"
        with log.open("wb") as output:
            # A separate session, so that Ctrl-C reaches only this process, which then stops the server.
            process = subprocess.Popen(
                command, stdout=output, stderr=subprocess.STDOUT, env=variables, start_new_session=True
            )
        server = Server(process, f"http://{HOST}:{http}", f"grpc://{HOST}:{grpc}", f"http://{HOST}:{metrics}", log)
        try:
            _wait_ready(server, ready_seconds)
            yield server
        finally:
            stop(process)


def stop(process: subprocess.Popen[bytes]) -> None:
    """Terminate the server and wait for it, by force if it does not end; also ends its remaining child processes."""
    if process.poll() is None:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
    # The stubs of its python backend outlive a killed server; they are in its session (see `running`).
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)


def fetch(url: str, seconds: float = 5.0) -> str:
    """The body of a loopback URL, without the environment's proxies. Raises OSError."""
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with opener.open(url, timeout=seconds) as response:
        return str(response.read().decode("utf-8", "replace"))


def _wait_ready(server: Server, seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while True:
        if server.process.poll() is not None:
            raise EnvironmentLacks(
                f"the server exited (exit code {server.process.returncode})",
                server.reason(),
                "read its message about the model",
            )
        with contextlib.suppress(OSError):
            fetch(f"{server.http}/v2/health/ready", 2.0)
            return
        if time.monotonic() >= deadline:
            raise EnvironmentLacks(
                f"the server is not ready after {seconds:g} s", server.reason(), "wait longer with --ready-seconds"
            )
        time.sleep(0.2)


def _refuse_taken(port: int) -> None:
    with socket.socket() as one:
        one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            one.bind((HOST, port))
        except (OSError, OverflowError) as error:
            reason = getattr(error, "strerror", None) or str(error)
            raise InputError(f"port {port} of {HOST} cannot be used", reason, "choose another with --ports") from None


def _command(program: Program, scratch: Path) -> tuple[list[str], dict[str, str]]:
    """The command and the environment variables that a program needs before it finds its own parts."""
    variables = dict(os.environ)
    if program.environment is None:
        return [str(program.binary)], variables
    bundle = program.binary.parent.parent
    python = program.environment / "bin" / "python"
    script = "import sys, sysconfig; print('%d.%d' % sys.version_info[:2], sysconfig.get_config_var('LIBDIR'))"
    try:
        version, libraries = subprocess.run(
            [python, "-c", script], capture_output=True, text=True, check=True, timeout=60
        ).stdout.split(maxsplit=1)
    except (OSError, subprocess.SubprocessError, ValueError) as error:
        raise EnvironmentLacks(f"{python} does not run", str(error), "; ".join(PIP_LINES)) from None
    stub = bundle / "python_backend_stubs" / version / "triton_python_backend_stub"
    if not stub.is_file():
        raise EnvironmentLacks(
            f"{PYTRITON} has no python backend for Python {version}", f"{stub} is missing", "use another Python"
        )
    folder = scratch / "backends" / "python"
    shutil.copytree(bundle / "backends" / "python", folder)
    shutil.copy2(stub, folder)
    site = bundle.parent.parent
    paths = [str(site / "nvidia_pytriton.libs"), libraries.strip(), variables.get("LD_LIBRARY_PATH", "")]
    variables["LD_LIBRARY_PATH"] = ":".join(path for path in paths if path)
    # The stub finds the environment's packages through the python3 that comes first.
    variables["PATH"] = f"{program.environment / 'bin'}:{variables.get('PATH', '')}"
    for name in ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV"):
        variables.pop(name, None)
    return [str(program.binary), f"--backend-directory={scratch / 'backends'}"], variables
