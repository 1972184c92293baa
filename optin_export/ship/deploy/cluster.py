"""The server in Kubernetes, alone and as a KServe InferenceService."""

from __future__ import annotations

from typing import Any

from optin_export.ship.deploy.facts import Facts

PORTS = {"http": 8000, "grpc": 8001, "metrics": 8002}
#: A server ends requests that it has begun before it stops.
GRACE = 60


def kubernetes(facts: Facts) -> list[dict[str, Any]]:
    """A Deployment of the image that the Dockerfile builds, and its Service."""
    labels = {"app": facts.app}
    pod = {
        "metadata": {
            "labels": labels,
            "annotations": {"prometheus.io/scrape": "true", "prometheus.io/port": str(PORTS["metrics"])},
        },
        "spec": {
            "terminationGracePeriodSeconds": GRACE,
            "containers": [_container(facts)],
            # The python backend shares memory with its processes; Kubernetes' default is 64 MiB.
            "volumes": [{"name": "shm", "emptyDir": {"medium": "Memory", "sizeLimit": "256Mi"}}],
        },
    }
    deployment = {
        "apiVersion": "apps/v1",
        "kind": "Deployment",
        "metadata": {"name": facts.app, "labels": labels},
        "spec": {
            "replicas": 2,
            "selector": {"matchLabels": labels},
            "strategy": {"rollingUpdate": {"maxUnavailable": 0, "maxSurge": 1}},
            "template": pod,
        },
    }
    service = {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": {"name": facts.app, "labels": labels},
        "spec": {
            "selector": labels,
            "ports": [{"name": name, "port": port, "targetPort": name} for name, port in PORTS.items()],
        },
    }
    return [deployment, service]


def _container(facts: Facts) -> dict[str, Any]:
    return {
        "name": "triton",
        "image": facts.own_image,
        "args": facts.command("/models"),
        "ports": [{"name": name, "containerPort": port} for name, port in PORTS.items()],
        # Loading and warming up may take minutes; liveness is asked only afterwards.
        "startupProbe": {**_probe("/v2/health/ready"), "failureThreshold": 60},
        "readinessProbe": _probe(f"/v2/models/{facts.entry}/ready"),
        "livenessProbe": {**_probe("/v2/health/live"), "failureThreshold": 6},
        "resources": _resources(facts),
        "volumeMounts": [{"name": "shm", "mountPath": "/dev/shm"}],
        "securityContext": {"allowPrivilegeEscalation": False},
    }


def _probe(path: str) -> dict[str, Any]:
    return {"httpGet": {"path": path, "port": "http"}, "periodSeconds": 5, "timeoutSeconds": 2}


def _resources(facts: Facts) -> dict[str, Any]:
    """Requests for CPU without a limit, which would throttle single requests; memory with one."""
    memory = f"{facts.memory_mib}Mi"
    gpu = {"nvidia.com/gpu": 1} if facts.gpu else {}
    return {"requests": {"cpu": str(facts.cpus), "memory": memory}, "limits": {"memory": memory, **gpu}}


def kserve(facts: Facts) -> list[dict[str, Any]]:
    """An InferenceService; set storageUri to where `ship --to` wrote the repository (s3://, gs://, pvc://)."""
    model = {
        "modelFormat": {"name": "triton"},
        "protocolVersion": "v2",
        "storageUri": f"s3://YOUR-BUCKET/{facts.app}",
        "args": list(facts.arguments),
        "resources": _resources(facts),
        "readinessProbe": {
            "httpGet": {"path": f"/v2/models/{facts.entry}/ready", "port": 8080},
            "periodSeconds": 5,
            "timeoutSeconds": 2,
        },
    }
    if facts.packages:
        # The runtime's own image lacks what the models import.
        model["image"] = facts.own_image
    return [
        {
            "apiVersion": "serving.kserve.io/v1beta1",
            "kind": "InferenceService",
            "metadata": {"name": facts.app},
            "spec": {"predictor": {"minReplicas": 1, "model": model}},
        }
    ]
