#!/usr/bin/env bash
# A finished run becomes a Triton model repository whose every file is checked against its manifest.
set -euo pipefail
cd "$(dirname "$0")/.."
out=${OUT:-runs/examples}

# The run of 01_quickstart.sh: what is there is reused, what is missing is made.
optin-export recipes/quickstart.yaml --out "$out/quickstart" --quiet \
    --set data.calibration.samples=128 --set data.evaluation.samples=200 --set prune.budget.macs=0.6 \
    --set gates.speedup=null --set gates.accuracy_drop=5 --set ship.triton=false

# Into a repository that a server may be reading: each model is swapped whole. With a bill of materials.
optin-export ship "$out/quickstart" --to "$out/repository" --name digits --replace --bom
find "$out/repository" -type f | sort

optin-export verify "$out/quickstart"
optin-export verify "$out/repository"

# One changed byte is found (exit code 2).
rm -rf "$out/damaged"
cp -r "$out/repository" "$out/damaged"
printf 'x' >>"$(find "$out/damaged" -name config.pbtxt | head -n 1)"
if optin-export verify "$out/damaged"; then echo "a change was not noticed" >&2 && exit 1; fi
