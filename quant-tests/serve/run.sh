#!/usr/bin/env bash
# `fewbit serve` with real clients: the openai package, Chromium on the chat page, and a crowd.
#
#   quant-tests/serve/run.sh [SECONDS OF LOAD] [CLIENTS]
#
# Needs Python with venv and Chromium (Debian: python3-venv, chromium); the network for crates.io and PyPI.
# Screenshots of the page lie in scratch/page afterwards.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
here=quant-tests/serve
seconds=${1:-120}
clients=${2:-200}

python=$(quant-tests/venv.sh scratch/serve-venv "$here/requirements.txt")
PYTHON=$python quant-tests/fetch-smollm2.sh downloads
model=downloads/smollm2.gguf
${CARGO:-cargo} build --release --package fewbit
fewbit=${CARGO_TARGET_DIR:-target}/release/fewbit

echo "The openai package"
"$python" "$here/openai_client.py" "$fewbit" "$model"
echo "The chat page"
"$python" "$here/page_test.py" "$fewbit" "$model" scratch/page
echo "$clients clients for $seconds seconds"
"$python" "$here/load.py" "$fewbit" "$model" --clients "$clients" --seconds "$seconds"
