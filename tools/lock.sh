#!/usr/bin/env bash
# Write requirements/dev.lock: the exact versions that `pip install -e '.[cpu,triton,test]'` resolves to on this platform.
# Needs uv (pip install uv). Install them with: pip install -r requirements/dev.lock
set -euo pipefail
cd "$(dirname "$0")/.."
uv pip compile pyproject.toml --extra cpu --extra triton --extra test --python-version 3.11 \
    --no-header --no-annotate --no-emit-index-url --upgrade --quiet --output-file requirements/dev.lock
