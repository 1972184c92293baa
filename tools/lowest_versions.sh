#!/usr/bin/env bash
# The lowest versions that pyproject.toml allows: install them in a fresh environment, and use them.
# lowest_versions.sh [FOLDER]: where the environment is made (default: a temporary folder, deleted afterwards).
# It downloads about 7 GB, so it is no part of .ci/run: run it when a lower bound or the use of a dependency changes.
set -euo pipefail
cd "$(dirname "$0")/.."
place=${1:-}
if [ -z "$place" ]; then
    place=$(mktemp -d)
    trap 'rm -rf "$place"' EXIT
fi
export HF_HUB_OFFLINE=1

# pip has no such option: uv resolves every direct dependency to its lower bound.
python3 -m venv "$place/uv"
"$place/uv/bin/pip" install -q uv
python3 -m venv "$place/venv"
"$place/uv/bin/uv" pip install --python "$place/venv/bin/python" --resolution lowest-direct '.[cpu,triton]'

# Outside of the clone, where the installed package is the one that is found.
recipes=$PWD/recipes
cd "$place"
"$place/venv/bin/optin-export" doctor
"$place/venv/bin/optin-export" "$recipes/quickstart.yaml" --out run --set gates.other_work=1 --set gates.speedup=1
"$place/venv/bin/optin-export" check run
"$place/venv/bin/optin-export" ship run --to models
"$place/venv/bin/optin-export" verify models
"$place/venv/bin/optin-export" export run --format timm --to exported
echo "the lowest versions work"
