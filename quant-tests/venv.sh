#!/usr/bin/env bash
# Makes or completes a virtual environment of Python, and prints its interpreter.
#
#   quant-tests/venv.sh FOLDER REQUIREMENTS.txt
set -euo pipefail
venv=$1

if ! python3 -c 'import ensurepip, venv' 2>/dev/null; then
    echo "These tests ask Python packages and need Python with venv:" >&2
    echo "  apt-get install python3-venv" >&2
    exit 1
fi
if [ ! -x "$venv/bin/pip" ]; then
    python3 -m venv --clear "$venv" >&2
fi
"$venv/bin/pip" install --quiet --disable-pip-version-check --requirement "$2" >&2
echo "$venv/bin/python"
