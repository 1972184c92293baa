"""An image with the models in it, and a server with Prometheus and Grafana on one machine."""

from __future__ import annotations

from typing import Any

from optin_export.ship.deploy.facts import Facts

PROMETHEUS, GRAFANA = "prom/prometheus:v3.5.0", "grafana/grafana:12.1.1"
READY = "http://localhost:8000/v2/health/ready"


def dockerfile(facts: Facts) -> str:
    """Build it in the folder that holds the repository: docker build -f DEPLOY/Dockerfile -t NAME REPOSITORY."""
    packages = " ".join(facts.packages)
    install = f"RUN pip install --no-cache-dir {packages}\n" if packages else ""
    command = ", ".join(f'"{word}"' for word in facts.command("/models"))
    return (
        f"# Build: docker build -f Dockerfile -t {facts.own_image} {facts.repository}\n"
        f"FROM {facts.image}\n"
        f"{install}"
        "COPY . /models\n"
        "EXPOSE 8000 8001 8002\n"
        f'HEALTHCHECK --interval=10s --start-period=120s CMD ["curl", "-fs", "{READY}"]\n'
        f"CMD [{command}]\n"
    )


def compose(facts: Facts) -> dict[str, Any]:
    """triton, prometheus and grafana; all ports on the loopback address only, because nothing asks for a password."""
    server: dict[str, Any] = {
        **_image(facts),
        "command": facts.command("/models"),
        "ports": [f"127.0.0.1:{port}:{port}" for port in (8000, 8001, 8002)],
        "volumes": [f"{facts.repository}:/models:ro"],
        "shm_size": "256m",
        "healthcheck": {
            "test": ["CMD", "curl", "-fs", READY],
            "interval": "10s",
            "start_period": "120s",
        },
        "restart": "unless-stopped",
    }
    if facts.gpu:
        device = {"driver": "nvidia", "count": 1, "capabilities": ["gpu"]}
        server["deploy"] = {"resources": {"reservations": {"devices": [device]}}}
    return {
        "services": {
            "triton": server,
            "prometheus": {
                "image": PROMETHEUS,
                "command": ["--config.file=/etc/prometheus/prometheus.yaml"],
                "ports": ["127.0.0.1:9090:9090"],
                "volumes": [
                    "./prometheus.yaml:/etc/prometheus/prometheus.yaml:ro",
                    "./alerts.yaml:/etc/prometheus/alerts.yaml:ro",
                ],
            },
            "grafana": {
                "image": GRAFANA,
                "ports": ["127.0.0.1:3000:3000"],
                "volumes": [
                    "./grafana/datasources.yaml:/etc/grafana/provisioning/datasources/optin-export.yaml:ro",
                    "./grafana/dashboards.yaml:/etc/grafana/provisioning/dashboards/optin-export.yaml:ro",
                    "./grafana/dashboard.json:/dashboards/dashboard.json:ro",
                ],
            },
        }
    }


def _image(facts: Facts) -> dict[str, Any]:
    if not facts.packages:
        return {"image": facts.image}
    packages = " ".join(facts.packages)
    return {"build": {"context": ".", "dockerfile_inline": f"FROM {facts.image}\nRUN pip install {packages}\n"}}
