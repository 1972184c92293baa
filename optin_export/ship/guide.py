"""Instructions for a shipment, printed after it with the next commands."""

from __future__ import annotations

from typing import TYPE_CHECKING

from optin_export.recipe import Recipe
from optin_export.ship.images import IMAGE, docker_line

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
    name, section = shipped.names[0], recipe.ship
    tag = shipped.image.split(" ")[0]
    line = docker_line(str(shipped.repository.resolve()), tag if tag.startswith(IMAGE) else f"{IMAGE}:YY.MM-py3", False)
    gpu = line.replace("docker run --rm ", "docker run --rm --gpus=all ")
    return [
        f"server image: {shipped.image}",
        f"serve: {gpu if section.backend == 'tensorrt' else line}",
        *comparison(name, recipe),
        "watch (Prometheus, port 8002): " + ", ".join(METRICS),
        f"back: optin-export rollback {shipped.repository} {name}",
    ]


def comparison(name: str, recipe: Recipe) -> list[str]:
    """The command that compares both served models; empty if only one is served."""
    section = recipe.ship
    if section.layout == "pruned" or (section.layout == "versions" and section.serve != "all"):
        return []
    base, pruned = (f"{name}-base", name) if section.layout == "models" else (f"{name}:1", f"{name}:2")
    return [f"compare: optin-export client grpc://HOST:8001 --model {base} --model {pruned} --run RUN"]
