"""Prometheus' alert rules and a Grafana dashboard of the counters that `ship` names."""

from __future__ import annotations

from typing import Any

from optin_export.ship.deploy.facts import Facts


def prometheus() -> dict[str, Any]:
    """A scrape configuration for compose.yaml."""
    return {
        "global": {"scrape_interval": "10s", "evaluation_interval": "10s"},
        "rule_files": ["/etc/prometheus/alerts.yaml"],
        "scrape_configs": [{"job_name": "triton", "static_configs": [{"targets": ["triton:8002"]}]}],
    }


def _rate(counter: str, chosen: str) -> str:
    return f"sum(rate({counter}{{{chosen}}}[5m]))"


def rules(facts: Facts) -> dict[str, Any]:
    """Alerts on failures, on waiting for longer than computing, on a long queue, and on a server that is gone."""
    chosen = f'model="{facts.name}"'
    waiting = _rate("nv_inference_queue_duration_us", chosen)
    computing = _rate("nv_inference_compute_infer_duration_us", chosen)
    served = _rate("nv_inference_request_success", chosen)
    failed = _rate("nv_inference_request_failure", chosen)
    alerts = [
        _alert("Down", 'up{job="triton"} == 0', "1m", "critical", "Prometheus cannot reach the server."),
        _alert(
            "Failures",
            f"{failed} / ({failed} + {served}) > 0.01",
            "5m",
            "critical",
            "More than 1 % of the requests fail. Roll back: optin-export rollback REPOSITORY " + facts.name,
        ),
        _alert(
            "QueueLongerThanCompute",
            f"{waiting} > {computing}",
            "10m",
            "warning",
            "Requests wait for longer than they are computed: add instances or replicas, or limit the queue "
            "(ship.config: dynamic_batching.default_queue_policy).",
        ),
        _alert(
            "Backlog",
            f"sum(nv_inference_pending_request_count{{{chosen}}}) > 100",
            "5m",
            "warning",
            "More than 100 requests are waiting.",
        ),
    ]
    return {"groups": [{"name": f"optin-export-{facts.app}", "rules": alerts}]}


def _alert(name: str, condition: str, lasting: str, severity: str, text: str) -> dict[str, Any]:
    return {
        "alert": f"Triton{name}",
        "expr": condition,
        "for": lasting,
        "labels": {"severity": severity},
        "annotations": {"summary": text},
    }


def dashboard(facts: Facts) -> dict[str, Any]:
    """Panels for the models that a variable chooses: traffic, failures, latency and its parts, batching, queue."""
    chosen, served = 'model=~"$model"', "nv_inference_request_success"
    by_model = "sum by (model, version) (rate({}{{" + chosen + "}}[$__rate_interval]))"
    each = {
        name: f"{by_model.format(f'nv_inference_{name}_duration_us')} / {by_model.format(served)}"
        for name in ("request", "queue", "compute_infer")
    }
    batches = f"{by_model.format('nv_inference_count')} / {by_model.format('nv_inference_exec_count')}"
    panels = [
        ("Requests", "reqps", by_model.format(served)),
        ("Failed requests", "reqps", by_model.format("nv_inference_request_failure")),
        ("Mean latency in the server", "µs", each["request"]),
        ("of it: in the queue", "µs", each["queue"]),
        ("of it: computing", "µs", each["compute_infer"]),
        ("Rows in a batch", "short", batches),
        ("Waiting requests", "short", f"sum by (model, version) (nv_inference_pending_request_count{{{chosen}}})"),
    ]
    source = {"type": "prometheus", "uid": "${source}"}
    return {
        "title": f"{facts.name} on Triton",
        "uid": f"optin-export-{facts.app}"[:40],
        "schemaVersion": 39,
        "timezone": "browser",
        "refresh": "10s",
        "time": {"from": "now-1h", "to": "now"},
        "templating": {
            "list": [
                {"name": "source", "type": "datasource", "query": "prometheus", "label": "data source"},
                {
                    "name": "model",
                    "type": "query",
                    "datasource": source,
                    "query": f"label_values({served}, model)",
                    "refresh": 2,
                    "multi": True,
                    "includeAll": True,
                    "current": {"text": ["All"], "value": ["$__all"]},
                },
            ]
        },
        "panels": [_panel(index, *panel, source) for index, panel in enumerate(panels)],
    }


def _panel(index: int, title: str, unit: str, query: str, source: dict[str, str]) -> dict[str, Any]:
    return {
        "id": index + 1,
        "type": "timeseries",
        "title": title,
        "datasource": source,
        "gridPos": {"x": 12 * (index % 2), "y": 8 * (index // 2), "w": 12, "h": 8},
        "fieldConfig": {"defaults": {"unit": unit, "min": 0}, "overrides": []},
        "targets": [{"refId": "A", "datasource": source, "expr": query, "legendFormat": "{{model}} {{version}}"}],
    }
