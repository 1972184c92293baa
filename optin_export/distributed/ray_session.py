"""Everything that uses Ray: joining a cluster, workers that hold state and process items, single tasks."""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import os
import shutil
import socket
import tempfile
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from optin_export.distributed.workers import Facts, Worker, recorded
from optin_export.environment import variable
from optin_export.errors import EnvironmentLacks, missing_package

#: How often one item is tried on workers that die or hang before the run gives up.
ATTEMPTS = 4
#: Maximum seconds for joining a running cluster.
JOINING = 120.0
#: Seconds between two checks of time-outs and messages.
TURN = 0.5
STORE_BYTES = 2**31


@dataclass(frozen=True)
class Options:
    """where: "local" (processes of this machine), "auto" (the cluster this machine belongs to), "ray://HOST:PORT" or
    "HOST:PORT". workers: default: as many as the cluster has CPUs. timeout: seconds for joining, for a worker to start,
    and for one item of work. shared_files: the workers see this machine's files under the same paths."""

    where: str
    workers: int | None = None
    timeout: float = 600.0
    shared_files: bool = False


class Session:
    """A connection to a cluster, for use in `with`; closing ends its workers, and a local cluster as a whole.

    Raises EnvironmentLacks if Ray is missing or the cluster cannot be reached in time.
    """

    def __init__(self, options: Options) -> None:
        self.options, self.local = options, options.where == "local"
        with _on_loopback() if self.local else contextlib.nullcontext():  # Ray reads it on import
            try:
                import ray
            except ImportError:
                raise missing_package("ray", "--cluster", "ray") from None
        self.ray: Any = ray
        self.shared_files = options.shared_files or self.local
        self.folder: str | None = None
        self.dashboard = ""

    def __enter__(self) -> Session:
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
        if self.local:
            self._start()
        else:
            self._join()
        return self

    def __exit__(self, *error: object) -> None:
        # A second Ctrl-C must not keep the processes alive.
        with contextlib.suppress(KeyboardInterrupt):
            self.ray.shutdown()
        if self.folder is not None:
            shutil.rmtree(self.folder, ignore_errors=True)

    def _start(self) -> None:
        # Sockets lie below it, and their paths must be short.
        self.folder = tempfile.mkdtemp(prefix="oe-", dir="/tmp")
        # Workers import the modules that this process has imported, wherever they are.
        package = str(Path(__file__).resolve().parents[2])
        path = os.pathsep.join(filter(None, [package, os.environ.get("PYTHONPATH")]))
        constants: Any = importlib.import_module("ray._private.ray_constants")
        reachable, constants.ENABLE_RAY_CLUSTER = constants.ENABLE_RAY_CLUSTER, False
        try:
            with variable("PYTHONPATH", path), _on_loopback():
                context = self.ray.init(
                    address="local",
                    num_cpus=self.options.workers or os.cpu_count(),
                    include_dashboard=all(map(importlib.util.find_spec, ("aiohttp", "aiohttp_cors", "grpc"))),
                    object_store_memory=min(STORE_BYTES, _shared_memory()),
                    log_to_driver=False,
                    logging_level="ERROR",
                    _temp_dir=self.folder,
                )
            self.dashboard = context.dashboard_url or ""
        except Exception as error:
            raise EnvironmentLacks("Ray does not start here", _line(error), "or run without --cluster") from error
        finally:
            constants.ENABLE_RAY_CLUSTER = reachable

    def _join(self) -> None:
        where, seconds = self.options.where, min(self.options.timeout, JOINING)
        host, _, port = where.removeprefix("ray://").rpartition(":")
        if where != "auto":
            try:
                socket.create_connection((host, int(port)), timeout=seconds).close()
            except (OSError, ValueError) as error:
                raise _unreachable(where, _line(error)) from None
        outcome: dict[str, Any] = {}
        end = time.monotonic() + seconds

        def join() -> None:
            while True:
                try:
                    outcome["context"] = self.ray.init(address=where, log_to_driver=False, logging_level="ERROR")
                    return
                except ConnectionAbortedError as error:
                    # A head node that has just started accepts connections before it can start the server for them,
                    # and gives up after 30 s: the same request succeeds a little later. Its refusal is a traceback,
                    # whose last line is the most informative.
                    outcome["why"] = _line(error, -1)
                except BaseException as error:  # final
                    outcome["why"] = _line(error)
                    return
                if time.monotonic() + TURN >= end:
                    return
                time.sleep(TURN)

        # Ray itself may wait for minutes; the thread is abandoned then.
        thread = threading.Thread(target=join, daemon=True)
        thread.start()
        thread.join(seconds)
        if "context" not in outcome:
            raise _unreachable(where, outcome.get("why", f"no answer within {seconds:g} s"))
        url = getattr(outcome["context"], "dashboard_url", None)
        self.dashboard = url or ""

    @property
    def workers(self) -> int:
        return self.options.workers or max(1, int(self.ray.cluster_resources().get("CPU", 1)))

    def missing(self, resources: Mapping[str, float]) -> str | None:
        """The resources that no single living node has, in words; None if some node has all of them."""
        nodes = [node["Resources"] for node in self.ray.nodes() if node["Alive"]]
        if any(all(node.get(name, 0) >= amount for name, amount in resources.items()) for node in nodes):
            return None
        absent = [name for name in resources if not any(name in node for node in nodes)]
        return ", ".join(absent) if absent else " and ".join(f"{name}: {n:g}" for name, n in resources.items())

    def put(self, value: Any) -> Any:
        """A reference to the value in the cluster's object store; workers that receive it get the value."""
        return self.ray.put(value)

    def submit(self, function: Callable[..., Any], *args: Any, resources: Mapping[str, float] | None = None) -> Any:
        """Run `function(*args)` on a node with these resources; if its worker dies, run it again elsewhere."""
        wanted = dict(resources or {})
        cpus, gpus = wanted.pop("CPU", 1.0), wanted.pop("GPU", 0.0)
        remote = self.ray.remote(recorded)
        options = {"num_cpus": cpus, "num_gpus": gpus, "resources": wanted, "max_retries": ATTEMPTS - 1}
        return remote.options(**options).remote(function, *args)

    def finished(self, tasks: Mapping[Any, str], turn: Callable[[], None]) -> Iterator[tuple[str, Any, Facts]]:
        """(name, result, facts) of every submitted task, in order of completion; `turn` is called periodically.

        Raises what a task raised, and EnvironmentLacks if a task's workers died too often.
        """
        waiting = dict(tasks)
        try:
            while waiting:
                ready, _ = self.ray.wait(list(waiting), num_returns=1, timeout=TURN)
                turn()
                for ref in ready:
                    name = waiting.pop(ref)
                    try:
                        found, facts = self.ray.get(ref)
                    except self.ray.exceptions.RayTaskError as error:
                        raise error.cause from None
                    except self.ray.exceptions.RayError as error:
                        raise _gave_up(name, _line(error)) from None
                    yield name, found, facts
        finally:
            for ref in waiting:
                self.ray.cancel(ref, force=True)

    def messages(self) -> Any:
        """A queue that workers put messages into."""
        from ray.util.queue import Queue

        return Queue(actor_options={"num_cpus": 0})

    def pool(self, work: Callable[[Any], Any], threads: int = 1, gpus: int = 0) -> Pool:
        """Workers that all hold `work`. gpus: number reserved for each worker; Ray numbers them from 0 in each.

        Raises EnvironmentLacks if no node has that many.
        """
        return Pool(self, work, threads, gpus)

    def workers_with(self, gpus: int) -> int:
        """How many workers can exist if each needs this number of GPUs on one node."""
        if not gpus:
            return self.workers
        per_node = (int(node["Resources"].get("GPU", 0)) // gpus for node in self.ray.nodes() if node["Alive"])
        return min(self.workers, sum(per_node))


class Pool:
    """Workers that each hold the same work, sent once, and process items of it; for use in `with`.

    A worker that dies, or takes longer than the time-out, is restarted and its item is assigned again. Each item's
    result is taken once.
    """

    def __init__(self, session: Session, work: Callable[[Any], Any], threads: int, gpus: int = 0) -> None:
        from ray import cloudpickle

        workers = session.workers_with(gpus)
        if not workers:
            raise no_gpus(gpus)
        self.session, self.ray = session, session.ray
        self.errors = self.ray.exceptions
        payload = cloudpickle.dumps(work)
        self.bytes_out, self.retried = len(payload), 0
        self.reference = self.ray.put(payload)  # kept: a worker that is restarted needs it
        actor = self.ray.remote(Worker).options(num_cpus=1, num_gpus=gpus, max_restarts=-1, max_task_retries=0)
        self.actors = [actor.remote(self.reference, threads) for _ in range(workers)]
        self.greeted: dict[Any, int] = {one.hello.remote(): number for number, one in enumerate(self.actors)}
        self.started = time.monotonic()
        self.idle: deque[int] = deque()
        self.trouble = "no worker answered"
        self.lost: Callable[[str], None] = lambda line: None

    def __enter__(self) -> Pool:
        return self

    def __exit__(self, *error: object) -> None:
        for one in self.actors:
            self.ray.kill(one)

    def map(self, items: Sequence[Any]) -> Iterator[tuple[Any, Facts]]:
        """(result, facts) of every item, in the order of the items."""
        waiting, attempts = deque(range(len(items))), Counter[int]()
        running: dict[Any, tuple[int, int, float]] = {}
        done: dict[int, tuple[Any, Facts]] = {}
        for wanted in range(len(items)):
            while wanted not in done:
                self._greet()
                while waiting and self.idle:
                    number, item = self.idle.popleft(), waiting.popleft()
                    attempts[item] += 1
                    running[self.actors[number].do.remote(items[item])] = item, number, time.monotonic()
                self._check_alive(running)
                ready, _ = self.ray.wait([*running, *self.greeted], num_returns=1, timeout=TURN)
                for ref in ready:
                    if ref in running:
                        self._take(ref, running, done, waiting)
                self._end_hanging(running)
                if waiting and attempts[waiting[0]] >= ATTEMPTS:
                    raise _gave_up(str(items[waiting[0]]), self.trouble)
            yield done.pop(wanted)

    def _take(self, ref: Any, running: dict[Any, Any], done: dict[int, Any], waiting: deque[int]) -> None:
        item, number, _ = running.pop(ref)
        try:
            done[item] = self.ray.get(ref)
            self.idle.append(number)
        except self.errors.RayTaskError as error:
            raise error.cause from None
        except self.errors.RayError as error:  # its process or its node has died
            self.retried += 1
            self.trouble = _line(error)
            self.lost(f"worker {number} was lost and its work given out again: {self.trouble}")
            waiting.appendleft(item)
            self.greeted[self.actors[number].hello.remote()] = number

    def _greet(self) -> None:
        """Make workers that have answered ready for work; keep the error of one that failed to start."""
        ready, _ = (
            self.ray.wait(list(self.greeted), num_returns=len(self.greeted), timeout=0) if self.greeted else ([], [])
        )
        for ref in ready:
            number = self.greeted.pop(ref)
            try:
                self.ray.get(ref)
                self.idle.append(number)
            except self.errors.ActorUnavailableError:
                self.greeted[self.actors[number].hello.remote()] = number
            except self.errors.RayError as error:
                self.trouble = _line(error)

    def _check_alive(self, running: Mapping[Any, Any]) -> None:
        late = time.monotonic() - self.started > self.session.options.timeout
        if not running and not self.idle and (not self.greeted or late):
            why = self.trouble if not late else f"{self.trouble} within {self.session.options.timeout:g} s"
            raise EnvironmentLacks(
                "the cluster's workers do not start", why, "install this package and torch on every node"
            )

    def _end_hanging(self, running: dict[Any, Any]) -> None:
        """Kill workers that take too long; the item's call then fails as if its worker had died."""
        for ref, (item, number, since) in list(running.items()):
            if time.monotonic() - since > self.session.options.timeout:
                running[ref] = item, number, time.monotonic()
                self.ray.kill(self.actors[number], no_restart=False)


@contextlib.contextmanager
def _on_loopback() -> Iterator[None]:
    """Make a cluster that Ray starts listen on the loopback only: its ports run code from anyone who connects.

    The variable is named after the systems where this is Ray's default, but works on all. Setting the node's address
    is not enough: Ray replaces 127.0.0.1 by the machine's own address.
    """
    with variable("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0"):
        yield


def _shared_memory() -> int:
    """Half of the free shared memory, in bytes; Ray's object store lies there and overflows to disk."""
    try:
        free = shutil.disk_usage("/dev/shm").free
    except OSError:
        free = STORE_BYTES
    return max(100 * 2**20, free // 2)


def _line(error: BaseException, which: int = 0) -> str:
    """One line of the error's message, by default the first."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines[which] if lines else type(error).__name__)[:300]


def _unreachable(where: str, why: str) -> EnvironmentLacks:
    fix = "start one (`ray start --head`) or name its head, ray://HOST:10001; versions of Ray and Python must agree"
    return EnvironmentLacks(f"the cluster '{where}' cannot be reached", why, fix)


def no_gpus(gpus: int) -> EnvironmentLacks:
    return EnvironmentLacks(
        f"the recipe needs {gpus} GPU{'s' * (gpus > 1)} on one node",
        "no node of the cluster has them",
        "join a cluster that does, or name 'cpu' in model.device_map and in targets",
    )


def _gave_up(what: str, why: str) -> EnvironmentLacks:
    return EnvironmentLacks(
        f"workers died {ATTEMPTS} times over {what[:120]}",
        why,
        "use fewer --workers, or machines with more memory",
    )
