"""Instructions for a shipment, printed after it with the next commands."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from optin_export.recipe import Recipe
from optin_export.ship.images import docker_line
from optin_export.ship.own_config import server_arguments

if TYPE_CHECKING:
    from optin_export.ship import Shipped

#: Counters of Triton's metrics endpoint to watch during a rollout, and their meaning.
METRICS = {
    "nv_inference_request_failure": "must not rise",
    "nv_inference_request_success": "the rate of each model and version: who gets the traffic",
    "nv_inference_request_duration_us": "divided by request_success: mean latency in the server",
    "nv_inference_queue_duration_us": "of it, waiting: rises first when the server is too slow",
    "nv_inference_compute_infer_duration_us": "of it, the engine: what pruning makes smaller",
    "nv_inference_exec_count": "request counts divided by it: how well requests share batches",
    "nv_inference_pending_request_count": "the queue now",
}


def rollout(shipped: Shipped, recipe: Recipe) -> list[str]:
    """Lines: image, docker, comparison if both models are served, metrics to watch, and the rollback."""
    name = shipped.names[0]
    gpu, flags = recipe.ship.backend == "tensorrt", server_arguments(recipe.ship.config)
    place = shipped.url or str(shipped.repository.resolve())
    line = docker_line(place, shipped.image, gpu, flags)
    back = f"optin-export rollback {shipped.repository} {name}"
    return [
        f"server image: {shipped.image}",
        f"serve: {line}",
        *_texts(shipped, recipe),
        *comparison(name, recipe),
        "watch (Prometheus, port 8002): " + ", ".join(METRICS),
        f"back: {f'ship the earlier run again: {shipped.url} keeps no earlier models' if shipped.url else back}",
    ]


def _texts(shipped: Shipped, recipe: Recipe) -> list[str]:
    """For text models: how to send a text, and which requests the server can batch."""
    if not recipe.is_text:
        return []
    name, length = shipped.names[0], recipe.export.sequence
    whole = f"{name}-ensemble"
    if whole not in shipped.names:
        return [
            f"send: token ids to {name} (no {whole} was shipped). The server batches only requests of equal length: "
            f"pad them to export.sequence ({length})"
        ]
    batching = (
        f"texts are padded to export.sequence ({length}), so that requests are batched"
        if recipe.ship.padding == "sequence"
        else f"only texts of equal length are batched; ship.padding=sequence pads them to {length}"
    )
    return [f"send: {curl(whole, recipe)}   ({batching})"]


def columns(recipe: Recipe) -> tuple[str, ...]:
    """The names of the ensemble's inputs for a text model: the columns of a row in capitals.

    Sentences that are compared are embedded separately, so a pair is not one row.
    """
    if recipe.model.task == "question-answering":
        return ("QUESTION", "CONTEXT")
    pairs = recipe.model.task == "text-classification" and "text_pair" in recipe.data.calibration.columns
    return ("TEXT", "TEXT_PAIR") if pairs else ("TEXT",)


def curl(model: str, recipe: Recipe, host: str = "127.0.0.1:8000") -> str:
    """The command that sends one text to the ensemble of a text model."""
    given = [{"name": name, "shape": [1, 1], "datatype": "BYTES", "data": ["some text"]} for name in columns(recipe)]
    return f"curl -s http://{host}/v2/models/{model}/infer -d '{json.dumps({'inputs': given})}'"


def comparison(name: str, recipe: Recipe) -> list[str]:
    """The command that compares both served models; empty if only one is served."""
    section = recipe.ship
    if section.layout == "pruned" or (section.layout == "versions" and section.serve != "all"):
        return []
    base, pruned = (f"{name}-base", name) if section.layout == "models" else (f"{name}:1", f"{name}:2")
    return [f"compare: optin-export client grpc://HOST:8001 --model {base} --model {pruned} --run RUN"]
