"""A real headless Chromium, and the pages it is shown: reports and a comparison with hostile names in them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from optin_export.report.compare import compare
from optin_export.report.html import render_html
from tests.report.test_html import gate, latency_result, make_report

HOSTILE = "<script>document.title='pwned'</script><img src=x onerror=\"document.title='pwned'\">\"'&amp;"
ARGUMENTS = (
    *("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync", "--disable-dev-shm-usage"),
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.browser)
            item.add_marker(pytest.mark.xdist_group("browser"))


@pytest.fixture(scope="session")
def chromium(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """A driver; skipped with the reason where Chromium, its driver or selenium is absent."""
    webdriver = pytest.importorskip("selenium.webdriver", reason="needs the extra 'browser' (selenium)")
    binary = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    driver = shutil.which("chromedriver")
    if binary is None or driver is None:
        pytest.skip("needs chromium and chromedriver on PATH (Debian: chromium, chromium-driver)")
    options = webdriver.ChromeOptions()
    options.binary_location = binary
    for argument in (*ARGUMENTS, f"--user-data-dir={tmp_path_factory.mktemp('profile')}"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    browser = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))
    try:
        yield browser
    finally:
        browser.quit()


@pytest.fixture(scope="session")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """report: everything that a page can hold; hostile: a failed run whose names are markup; compare: both."""
    root = tmp_path_factory.mktemp("pages")
    found = {}
    for name, report in (("report", full_report()), ("hostile", hostile_report())):
        run = root / name
        write_run(run, report)
        found[name] = run / "report.html"
        found[name].write_text(render_html(report, run), encoding="utf-8")
    found["compare"] = root / "compare.html"
    compare([root / "report", root / "hostile"], found["compare"])
    return found


def full_report() -> Any:
    base = make_report()
    pruning = {**base.pruning.model_dump(), "merged": (4, 4, 0, 2)}
    arm = {"p50": 9.1, "p90": 9.9, "p99": 12.0, "throughput": 110.0, "requests": 900, "queue": 0.1, "compute": 8.0}
    deployed = {
        **{"source": "client", "server": "Triton", "protocol": "grpc", "mode": "closed", "batch": 1, "concurrency": 1},
        **{"rate": None, "base": {**arm, "rows_per_batch": 1.0}, "pruned": {**arm, "p50": 6.0, "rows_per_batch": 1.0}},
        **{"speedup": {"median": 1.5, "ci_low": 1.4, "ci_high": 1.6}, "noise_floor": 0.02, "blocks": 24},
    }
    elsewhere = {
        **{"machine": "a-gpu", "target": "torch-cuda", "created": base.created, "environment": {}, "parity": None},
        **{"gates": [gate("speedup", ">= 1.3", 1.5)], "accuracy": None, "accuracy_note": "no data", "engines": []},
        "latency": [{**latency_result(1), "target": "torch-cuda"}],
    }
    stages = [{"name": "scoring", "seconds": 61.4, "reused": False, "peak_bytes": 900 << 20}]
    return make_report(pruning=pruning, deployed=[deployed], elsewhere=[elsewhere], stages=stages)


def hostile_report() -> Any:
    missed = gate(HOSTILE, ">= 2", 1.62, passed=False)
    summary = f"FAILED: missed: {HOSTILE} {'unbroken' * 30}."
    group = {"block": 0, "kind": HOSTILE, "count": 200, "kept": 90, "score_kept": 0.5}
    return make_report(
        name=HOSTILE,
        model={"source": HOSTILE + "/long" * 60, "task": "feature-extraction"},
        verdict={"passed": False, "summary": summary, "gates": [missed]},
        latency=[{**latency_result(1), "target": HOSTILE}],
        pruning={**make_report().pruning.model_dump(), "groups": [group]},
        environment={HOSTILE: HOSTILE, "cpu": HOSTILE},
    )


def write_run(run: Path, report: Any) -> None:
    generator = np.random.default_rng(0)
    for folder in ("measure", "scores", "plan", "model"):
        (run / folder).mkdir(parents=True)
    (run / "report.json").write_text(report.model_dump_json(), encoding="utf-8")
    (run / "recipe.yaml").write_text(json.dumps({"recipe": 1, "name": report.name, "seed": len(report.name)}))
    entries = [
        {
            **one.model_dump(),
            "samples": {
                arm: generator.gamma(400, ms / 400, (24, 15)).tolist() for arm, ms in (("base", 8), ("pruned", 5))
            },
        }
        for one in report.latency
    ]
    (run / "measure" / "latency.json").write_text(json.dumps(entries))
    save_file(
        {f"block{at:02d}.heads": generator.lognormal(-6, 2, 12) for at in range(4)}, run / "scores/scores.safetensors"
    )
    kept = {f"block{at:02d}.heads": {"count": 12, "kept": [0, 2, 5, 7, 8, 11]} for at in range(4)}
    (run / "plan" / "plan.json").write_text(json.dumps({"groups": kept}))
    pixels = generator.random((3, 32, 32, 1), dtype=np.float32)
    places = np.tile(np.arange(64) // 2, (3, 1))
    save_file({"pixels": pixels, "places": places}, run / "model" / "places.safetensors")
    (run / "manifest.json").write_text(json.dumps({"seed": 0, "recipe": "a" * 64, "inputs": {"weights": "b" * 64}}))
