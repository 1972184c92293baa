#!/usr/bin/env bash
# The whole way with one command: a small Vision Transformer to 60 % of its MACs, measured and judged.
# The numbers of rows are small so that this takes seconds; leave those --set options out for the real thing.
set -euo pipefail
cd "$(dirname "$0")/.."
out=${OUT:-runs/examples}

# What would be done, and what it takes; nothing is written.
optin-export recipes/quickstart.yaml --out "$out/quickstart" --dry-run

# Every field of the recipe can be set here. Without a gate on speedup, because a busy machine may miss it.
optin-export recipes/quickstart.yaml --out "$out/quickstart" --quiet \
    --set data.calibration.samples=128 --set data.evaluation.samples=200 --set prune.budget.macs=0.6 \
    --set gates.speedup=null --set gates.accuracy_drop=5 --set ship.triton=false

# A release pipeline judges the same run by gates of its own, with the same exit codes.
printf 'gates: 1\naccuracy_drop: 5\nmacs: 0.6\n' >"$out/gates.yaml"
optin-export check "$out/quickstart" --gates "$out/gates.yaml"
