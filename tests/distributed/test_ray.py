"""On real clusters of Ray on this machine: several processes, several nodes, and what is done to them."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch
import yaml
from PIL import Image

from optin_export import cli
from optin_export.data import load_sources
from optin_export.distributed.costs import Book
from optin_export.distributed.finished_shards import Memory
from optin_export.distributed.ray_session import Options, Session
from optin_export.distributed.scoring import spread_over
from optin_export.errors import EnvironmentLacks
from optin_export.models import Placement
from optin_export.recipe import Budget, PruneSection, validate
from optin_export.report import costs_of, still_elsewhere
from optin_export.scoring import Scores, Shard, score
from optin_export.ship import check_manifest
from optin_export.units import find_structure
from optin_export.workdir.files import read_json, sha256_file
from tests.conftest import ROOT, Make
from tests.shortly import SHORTLY
from tests.units.models import batches_for, small_model

pytestmark = [
    pytest.mark.ray,
    pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="pip install 'optin-export[ray]'"),
]
QUICK = """
import sys
from tests.shortly import measure_shortly
measure_shortly()
from optin_export import cli
sys.exit(cli.main(sys.argv[1:]))
"""


def processes_of_ray() -> list[Any]:
    """Living processes of Ray."""
    found = []
    for process in psutil.process_iter(["cmdline", "status", "name"]):
        words = " ".join(process.info["cmdline"] or [process.info["name"] or ""])
        if process.info["status"] != psutil.STATUS_ZOMBIE and any(
            n in words for n in ("raylet", "gcs_server", "ray::")
        ):
            found.append(process)
    return found


@pytest.fixture(autouse=True)
def nothing_left() -> Iterator[None]:
    """Whatever a test does to a cluster, none of its processes outlives it.

    Tests of one file never run side by side (tests/conftest.py): this looks at all of the machine's processes of Ray.
    """
    before = {process.pid for process in processes_of_ray()}
    yield
    end = time.monotonic() + 30
    while (left := new_processes(before)) and time.monotonic() < end:
        time.sleep(0.2)
    assert left == []


def new_processes(before: set[int]) -> list[Any]:
    """Those that were not there, nor were started by a raylet that was: another cluster may be at work here."""
    found = []
    for process in processes_of_ray():
        with contextlib.suppress(psutil.NoSuchProcess):
            if not before & {process.pid, process.ppid()}:
                found.append(process)
    return found


def scored(spread: Any = None, probes: int = 24, device_map: Any = None) -> Scores:
    torch.set_num_threads(1)  # as a worker's: sums of floats depend on the number of threads
    model, _ = small_model("bert")
    settings = PruneSection(budget=Budget(macs=0.5), probes=probes)
    more = {} if spread is None else {"spread": spread}
    structure = find_structure(model)
    where = Placement(device_map, blocks=structure.blocks)
    return score(model, structure, batches_for(model, 4, size=4), settings, 0, placement=where, **more)


def same(first: Scores, second: Scores) -> bool:
    return first.info == second.info and all(np.array_equal(v, second.values[k]) for k, v in first.values.items())


class Fatal:
    """Work that stops in the middle of a shard of probes, once, and says which process it is."""

    def __init__(self, work: Any, flag: Path) -> None:
        self.work, self.flag = work, flag

    def __call__(self, shard: Shard) -> Any:
        found = self.work(shard)
        if shard.kind == "probes" and shard.start == 8 and not self.flag.exists():
            self.flag.write_text(str(os.getpid()), encoding="utf-8")
            time.sleep(600)
        return found


class FatalNode(Fatal):
    """The same, on one of these nodes."""

    def __init__(self, work: Any, flag: Path, nodes: set[str]) -> None:
        super().__init__(work, flag)
        self.nodes = nodes

    def __call__(self, shard: Shard) -> Any:
        import ray

        if ray.get_runtime_context().get_node_id() in self.nodes and not self.flag.exists():
            self.flag.touch()
            time.sleep(600)
        # A worker elsewhere that started sooner would else have done everything before there is a node to lose.
        end = time.monotonic() + 120
        while not self.flag.exists() and time.monotonic() < end:
            time.sleep(0.05)
        return self.work(shard)


def kill_when_told(flag: Path) -> None:
    end = time.monotonic() + 500  # Ray's workers are niced: on a busy machine they take their time
    while not (flag.exists() and flag.read_text(encoding="utf-8")) and time.monotonic() < end:
        time.sleep(0.05)
    os.kill(int(flag.read_text(encoding="utf-8")), signal.SIGKILL)


def test_scores_are_those_of_one_process_also_when_a_worker_is_killed(tmp_path: Path) -> None:
    alone = scored()
    with Session(Options("local", workers=2)) as session:
        book = Book(tmp_path / "calm")
        assert same(scored(spread_over(session, tmp_path / "calm", "key", book)), alone)
        spent = costs_of(tmp_path / "calm")["scoring"]
        assert spent["workers"] in (1, 2) and spent["retried"] == 0 and spent["bytes_out"] > 10_000
        assert len(list((tmp_path / "calm" / "cluster").glob("*.log"))) == spent["workers"]
        # Now a worker is killed in the middle of a shard.
        flag, book = tmp_path / "pid", Book(tmp_path / "killed")
        killer = threading.Thread(target=kill_when_told, args=(flag,))
        killer.start()
        spread = spread_over(session, tmp_path / "killed", "key", book)
        assert same(scored(lambda work: spread(Fatal(work, flag))), alone)
        killer.join()
        after = costs_of(tmp_path / "killed")["scoring"]
        assert after["retried"] == 1 and after["tasks"] == spent["tasks"]  # nothing counts twice
        assert "given out again" in (tmp_path / "killed" / "cluster" / "driver.log").read_text(encoding="utf-8")


def test_a_restarted_driver_finds_what_is_done(tmp_path: Path) -> None:
    alone = scored()
    with Session(Options("local", workers=1)) as session:
        book, calls = Book(tmp_path), []

        def stop(stage: str, what: str, facts: Any, done: Any = book.done) -> None:
            done(stage, what, facts)
            calls.append(what)
            if len(calls) == 9:
                raise KeyboardInterrupt

        book.done = stop  # type: ignore[method-assign]
        with pytest.raises(KeyboardInterrupt):
            scored(spread_over(session, tmp_path, "key", book))
        assert len(list(tmp_path.rglob("*.safetensors"))) == 9
        again = Book(tmp_path)
        assert same(scored(spread_over(session, tmp_path, "key", again)), alone)
        assert again.stage("scoring").reused == 9
        assert not list(tmp_path.rglob("*.safetensors"))  # the scores are there: their parts are gone


def test_a_worker_that_hangs_is_replaced_and_the_run_gives_up_in_the_end(tmp_path: Path) -> None:
    with Session(Options("local", workers=1, timeout=3.0)) as session:

        def hang(item: int) -> dict[str, Any]:
            if item == 1 and not (tmp_path / "once").exists():
                (tmp_path / "once").touch()
                time.sleep(600)
            if item == 2:
                time.sleep(600)
            return {"item": item}

        session.options = Options("local", workers=1, timeout=30.0)
        with session.pool(hang) as pool:
            session.options = Options("local", workers=1, timeout=5.0)
            pool.started += 60
            assert [found["item"] for found, _ in pool.map([0, 1])] == [0, 1]
            assert pool.retried == 1
            pool.started += 600
            with pytest.raises(EnvironmentLacks, match="died 4 times"):
                list(pool.map([2]))


def test_errors_of_users_come_back_as_they_are(tmp_path: Path) -> None:
    from optin_export.errors import InputError

    def wrong(item: int) -> None:
        raise InputError("what", "why", "fix")

    with (
        Session(Options("local", workers=1)) as session,
        session.pool(wrong) as pool,
        pytest.raises(InputError) as error,
    ):
        list(pool.map([0]))
    assert (error.value.what, error.value.why, error.value.fix) == ("what", "why", "fix")


@pytest.mark.parametrize("where", ["ray://127.0.0.1:9", "127.0.0.1:9"])
def test_a_cluster_that_cannot_be_reached(where: str) -> None:
    with pytest.raises(EnvironmentLacks, match="cannot be reached"), Session(Options(where, timeout=5)):
        pass


def test_a_head_that_is_still_starting_is_asked_again() -> None:
    """A refusal by the server is repeated until the time is over, and then told by its last line; others are final."""
    session, asked = Session(Options("auto", timeout=1.3)), []

    class Head:
        def __init__(self, refusals: list[BaseException]) -> None:
            self.refusals = refusals

        def init(self, **ignored: Any) -> Any:
            asked.append(time.monotonic())
            if self.refusals:
                raise self.refusals.pop(0)
            return None

        def shutdown(self) -> None:
            pass

    refusal = "Initialization failure from server:\nTraceback (most recent call last):\nRuntimeError: not yet\n"
    session.ray = Head([ConnectionAbortedError(refusal)])
    with session:
        assert len(asked) == 2
    for refusals, why, times in (
        ([ConnectionAbortedError(refusal)] * 9, "RuntimeError: not yet", 3),
        ([ConnectionError("another version:\n  Python: 3.9"), ConnectionAbortedError(refusal)], "another version", 1),
    ):
        asked.clear()
        session.ray = Head(list(refusals))
        with pytest.raises(EnvironmentLacks, match=why):
            session.__enter__()
        assert len(asked) <= times


@pytest.fixture
def quick_recipe(vit_recipe: Make) -> Make:
    def make(**sections: Any) -> dict[str, Any]:
        return vit_recipe(**{"gates": {"speedup": 0.01, "other_work": 1.0}, **sections})

    return make


def written(recipe: dict[str, Any], folder: Path) -> Path:
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe), encoding="utf-8")
    return path


def command(*words: str, **more: Any) -> subprocess.Popen[str]:
    """The command line in a process of its own, whose measurements are short."""
    environment = {**os.environ, "PYTHONPATH": SHORTLY, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, "-c", QUICK, *words],
        env=environment,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        **more,
    )


def test_the_same_run_with_and_without_a_cluster(quick_recipe: Make, tmp_path: Path) -> None:
    path = written(quick_recipe(), tmp_path)
    for name, more in (("alone", ()), ("helped", ("--cluster", "local", "--workers", "2"))):
        process = command(str(path), "--out", str(tmp_path / name), "--quiet", *more)
        out, err = process.communicate(timeout=300)
        assert process.returncode == 0, out + err
    for name in ("scores/scores.safetensors", "plan/plan.json", "model/model.safetensors"):
        assert sha256_file(tmp_path / "alone" / name) == sha256_file(tmp_path / "helped" / name)
    assert check_manifest(tmp_path / "helped") == []
    report = read_json(tmp_path / "helped" / "report.json")
    (cost,) = report["costs"]
    assert cost["stage"] == "scoring" and cost["worker_seconds"] > 0 and cost["workers"] in (1, 2)
    assert "Cost on workers" in (tmp_path / "helped" / "report.html").read_text(encoding="utf-8")


def test_ctrl_c_leaves_no_process_and_the_run_goes_on_later(quick_recipe: Make, tmp_path: Path) -> None:
    recipe = quick_recipe()
    recipe["prune"] |= {"probes": 400, "score_samples": 48}
    path, out = written(recipe, tmp_path), tmp_path / "run"
    words = (str(path), "--out", str(out), "--quiet", "--cluster", "local", "--workers", "2", "--stop-after", "scoring")
    process = command(*words, start_new_session=True)
    end = time.monotonic() + 120
    while len(list(out.rglob("*.safetensors"))) < 3 and time.monotonic() < end and process.poll() is None:
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does: to all of them
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130 and "interrupted" in err, err
    done = len(list(out.rglob("*.safetensors")))
    assert done >= 3 and not (out / "scores").exists()
    process = command(*words)
    text, err = process.communicate(timeout=300)
    assert process.returncode == 0, text + err
    assert read_json(out / "cluster" / "costs.json")["scoring"]["reused"] == done


@contextlib.contextmanager
def nodes(*resources: dict[str, float], **head: Any) -> Iterator[Any]:
    """A cluster with a node for each, on this machine."""
    from ray.cluster_utils import Cluster

    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    os.environ["RAY_CLIENT_SERVER_CHECK_CHANNEL_TIMEOUT_S"] = "90"  # 30 s are few beside other tests
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = SHORTLY
    store = {"object_store_memory": 100 * 2**20, "num_cpus": 1, "include_dashboard": False}
    cluster = Cluster(initialize_head=True, head_node_args={**store, "resources": resources[0], **head})
    try:
        for one in resources[1:]:
            cluster.add_node(object_store_memory=100 * 2**20, num_cpus=1, resources=one)
        cluster.wait_for_nodes()
        yield cluster
    finally:
        import ray

        ray.shutdown()
        cluster.shutdown()
        if before is None:
            del os.environ["PYTHONPATH"]
        else:
            os.environ["PYTHONPATH"] = before


def gpus_of_worker(item: int) -> dict[str, Any]:
    """Those that Ray gave it, by Ray's own book."""
    import ray

    return {"seen": ray.get_runtime_context().get_accelerator_ids()["GPU"]}


def test_clusters_are_joined_by_their_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By Ray Client from outside, and as a part of it; a cluster that was joined goes on when the run is over."""
    alone = scored()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with nodes({}, ray_client_server_port=port, num_gpus=1) as cluster:  # Ray takes our word for the GPU
        monkeypatch.setenv("RAY_ADDRESS", cluster.address)
        for where in (f"ray://127.0.0.1:{port}", "auto"):
            if where != "auto":
                monkeypatch.delenv("RAY_ADDRESS")
                wait_for(port)
            with Session(Options(where)) as session:
                run = tmp_path / where[:3]
                assert same(scored(spread_over(session, run, "key", Book(run))), alone)
                with session.pool(gpus_of_worker, gpus=1) as pool:
                    assert [found["seen"] for found, _ in pool.map([0])] == [["0"]] and len(pool.actors) == 1
                assert session.missing({"nowhere": 1}) == "nowhere" and session.missing({"CPU": 1}) is None
            monkeypatch.setenv("RAY_ADDRESS", cluster.address)


def wait_for(port: int) -> None:
    end = time.monotonic() + 60
    while time.monotonic() < end:
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
            return
        time.sleep(0.2)


def test_a_lost_node_changes_nothing(tmp_path: Path) -> None:
    alone, flag = scored(), tmp_path / "pid"
    with nodes({}, {"lost": 1}) as cluster, Session(Options(cluster.address, workers=2)) as session:
        (lost,) = cluster.worker_nodes

        def lose_when_told() -> None:
            end = time.monotonic() + 120
            while not flag.exists() and time.monotonic() < end:
                time.sleep(0.05)
            cluster.remove_node(lost, allow_graceful=False)

        thread = threading.Thread(target=lose_when_told)
        thread.start()
        book = Book(tmp_path)
        spread = spread_over(session, tmp_path, "key", book)
        ours = {node["NodeID"] for node in session.ray.nodes() if "lost" in node["Resources"]}
        assert same(scored(lambda work: spread(FatalNode(work, flag, ours))), alone)
        thread.join()
        assert flag.exists() and costs_of(tmp_path)["scoring"]["retried"] >= 1


@pytest.mark.slow
def test_a_sweep_fans_out_by_value_and_a_fleet_measures_where_its_labels_are(
    quick_recipe: Make, tmp_path: Path
) -> None:
    targets = [
        {"engine": "onnxruntime"},
        {"engine": "onnxruntime", "resources": {"accelerator_type:A": 1}},
        {"engine": "torch", "resources": {"accelerator_type:B": 0.5}},
        {"engine": "onnxruntime", "resources": {"accelerator_type:C": 1}},
    ]
    path = written(quick_recipe(targets=targets), tmp_path)
    out = tmp_path / "fleet"
    with nodes({}, {"accelerator_type:A": 1}, {"accelerator_type:B": 1}) as cluster:
        address = cluster.address
        process = command(str(path), "--out", str(out), "--quiet", "--json", "--cluster", address)
        text, err = process.communicate(timeout=400)
        # C is nowhere: not evaluated, so the run has not passed.
        assert process.returncode == 4, text + err
        gates = {gate["name"]: gate for gate in json.loads(text)["verdict"]["gates"]}
        missing = gates["target.onnxruntime-cpu-1t-accelerator-type-c"]
        assert missing["measured"] is None and not missing["passed"]
        assert "no node of the cluster has accelerator_type:C" in missing["note"]
        for name in ("onnxruntime-cpu-1t-accelerator-type-a", "torch-cpu-1t-accelerator-type-b"):
            assert gates[f"target.{name}"]["passed"], gates[f"target.{name}"]
        assert {one.target for one in still_elsewhere(out)} == {
            "onnxruntime-cpu-1t-accelerator-type-a",
            "torch-cpu-1t-accelerator-type-b",
        }
        assert check_manifest(out) == []
        assert {one["stage"] for one in read_json(out / "report.json")["costs"]} == {"scoring", "fleet"}

        swept = quick_recipe(sweep={"prune.budget.macs": [0.7, 0.5]})
        path = written(swept, tmp_path)
        process = command(str(path), "--out", str(tmp_path / "sweep"), "--quiet", "--cluster", address)
        text, err = process.communicate(timeout=400)
        assert process.returncode == 0, text + err
    runs = read_json(tmp_path / "sweep" / "sweep.json")
    assert [one["exit_code"] for one in runs["runs"]] == [0, 0]
    assert runs["costs"]["runs"]["tasks"] == 2 and runs["costs"]["runs"]["bytes_back"] > 10_000
    for one in runs["runs"]:
        assert check_manifest(tmp_path / "sweep" / one["folder"]) == []
    assert len({sha256_file(p) for p in (tmp_path / "sweep").glob("*/scores/scores.safetensors")}) == 1


@pytest.mark.slow
def test_a_sweep_on_this_machines_workers(quick_recipe: Make, tmp_path: Path, monkeypatch: Any) -> None:
    path = written(quick_recipe(sweep={"prune.budget.macs": [0.7, 0.5, 0.001]}), tmp_path)
    out = tmp_path / "sweep"
    process = command(str(path), "--out", str(out), "--json", "--cluster", "local", "--workers", "2")
    text, err = process.communicate(timeout=400)
    assert process.returncode == 2, text + err
    told = json.loads(text)["runs"]
    assert [one["exit_code"] for one in told] == [0, 0, 2]
    assert (out / "macs-0.7" / "report.html").exists()
    # With another number of workers, or none, the same command takes over what there is.
    assert cli.main([str(path), "--out", str(out), "--quiet"]) == 2
    assert all(
        stage["reused"]
        for one in ("macs-0.7", "macs-0.5")
        for stage in read_json(out / one / "report.json")["stages"]
        if stage["name"] in ("scoring", "search", "surgery", "measure")
    )


def test_a_remembered_shard_is_bound_to_its_job(tmp_path: Path) -> None:
    """Scores of other data are never taken from a folder that was used before."""
    alone = scored()
    with Session(Options("local", workers=1)) as session:
        Memory(tmp_path / "cluster" / "shards", "other job")
        book = Book(tmp_path)
        assert same(scored(spread_over(session, tmp_path, "this job", book)), alone)
        assert book.stage("scoring").reused == 0
        if importlib.util.find_spec("accelerate"):
            # A worker puts the model where the recipe says, of the parts that it was sent as they are.
            spread = spread_over(session, tmp_path, "on disk", Book(tmp_path))
            assert same(scored(spread, device_map={"": "disk"}), alone)
        with pytest.raises(EnvironmentLacks, match="needs 99 GPUs"):
            scored(spread_over(session, tmp_path, "on GPUs", Book(tmp_path), gpus=99))


def by_path(folder: Path, **sections: Any) -> dict[str, Any]:
    """A recipe of which all is read from paths: the user's own model, and images."""
    for row in range(24):
        path = folder / "images" / "ab"[row % 2] / f"{row}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = np.random.default_rng(row).integers(0, 255, (32, 32, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(path)
    shutil.copy(ROOT / "recipes" / "cifar_resnet" / "resnet.py", folder / "net_of_a_user.py")
    return {
        "recipe": 1,
        "name": "by-path",
        "model": {
            "source": f"py:{folder / 'net_of_a_user.py'}:resnet",
            "task": "image-classification",
            "args": {"depth": 8, "classes": 5},
            "weights": "random",
            "preprocess": {"size": [32, 32], "mean": [0.5], "std": [0.5]},
        },
        "data": {"calibration": {"source": f"images:{folder / 'images'}"}},
        "prune": {"budget": {"macs": 0.6}, "probes": 8, "score_samples": 16},
        "export": {"batch": [1]},
        **sections,
    }


def test_a_users_model_and_images_travel_as_values(tmp_path: Path) -> None:
    """Workers score with neither file at hand."""
    torch.set_num_threads(1)
    sources = load_sources(validate(by_path(tmp_path), tmp_path))
    model, structure, prune = sources.model, find_structure(sources.model), sources.recipe.prune
    alone = score(model, structure, sources.scoring, prune, 0)
    shutil.rmtree(tmp_path / "images")
    (tmp_path / "net_of_a_user.py").unlink()
    with Session(Options("local", workers=1)) as session:
        spread = spread_over(session, tmp_path, "key", Book(tmp_path))
        assert same(score(model, structure, sources.scoring, prune, 0, spread=spread), alone)


@pytest.mark.slow
def test_a_sweep_of_a_users_model_and_images_on_this_machines_workers(tmp_path: Path) -> None:
    recipe = by_path(tmp_path, sweep={"prune.budget.macs": [0.8, 0.6]}, gates={"speedup": 0.01, "other_work": 1.0})
    process = command(str(written(recipe, tmp_path)), "--out", str(tmp_path / "sweep"), "--cluster", "local")
    text, err = process.communicate(timeout=400)
    assert process.returncode == 0, text + err
