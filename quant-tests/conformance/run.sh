#!/usr/bin/env bash
# The conformance suite: fewbit against ggml, llama.cpp, SentencePiece, mistral-common and transformers.
#
#   quant-tests/conformance/run.sh [ARGUMENT OF THE TEST RUNNERS…]
#
# Needs cmake, a C++ compiler, libclang, and Python with venv; the network for crates.io and PyPI.
# Everything that it makes lies in target/, scratch/ and downloads/.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
here=quant-tests/conformance

vendor/check-tools.sh
python=$(quant-tests/venv.sh scratch/conformance-venv "$here/requirements.txt")
PYTHON=$python quant-tests/fetch-smollm2.sh downloads

echo "Golden ids of the tokenizers, asked anew"
"$python" "$here/tokenizer_oracle.py" check

echo "An exported checkpoint, read by transformers"
cargo=${CARGO:-cargo}
transformers=$(quant-tests/venv.sh scratch/export-venv quant-tests/export/requirements.txt)
rm -rf scratch/exported
$cargo run --quiet --package fewbit-convert -- quant-tests/fixtures/tiny-mixtral scratch/exported.gguf --type F32 --force
$cargo run --quiet --package fewbit-convert -- export scratch/exported.gguf scratch/exported --dtype f32
HF_HUB_OFFLINE=1 "$transformers" quant-tests/export/check.py scratch/exported

FEWBIT_SMOLLM2=$PWD/downloads/smollm2.gguf
FEWBIT_MISTRAL_TOKENIZER=$("$python" "$here/tokenizer_oracle.py" vocabulary)
export FEWBIT_SMOLLM2 FEWBIT_MISTRAL_TOKENIZER
${CARGO:-cargo} test --package quant-tests --features ggml --test 'conformance_*' --no-fail-fast -- --show-output "$@"
