#!/usr/bin/env bash
# Several budgets as one sweep: every run has its own folder, the scores are computed once, one page compares them.
set -euo pipefail
cd "$(dirname "$0")/.."
out=${OUT:-runs/examples}

optin-export recipes/quickstart.yaml --out "$out/sweep" --quiet --set 'sweep={prune.budget.macs: [0.7, 0.5]}' \
    --set data.calibration.samples=64 --set data.evaluation.samples=100 --set prune.curve_samples=32 --set prune.probes=16 \
    --set export.batch='[1]' --set gates='{}' --set ship.triton=false

ls "$out/sweep"

# The same page of any finished runs.
optin-export compare "$out"/sweep/*/ --out "$out/compare.html"
