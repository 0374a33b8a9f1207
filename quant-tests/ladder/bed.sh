#!/usr/bin/env bash
# The ladder of a model of the test bed: stock files and better bits side by side, as dense.md and dense.svg (moe.…) here.
#
#   quant-tests/ladder/bed.sh FOLDER CALIBRATION.txt dense|moe [CHUNKS]
#
# FOLDER holds dense-F16.gguf and moe-F16.gguf (quant-tests/upcycle.py, with --dense and without, then fewbit-convert
# --type F16); statistics and files are made beside them, and stay. CALIBRATION.txt must not hold the test text, fixtures/text/en.txt.
# FEWBIT names the folder of the binaries (target/release).
set -euo pipefail
[ $# -ge 3 ] || { sed -n '2,9s/^# \{0,1\}//p' "$0" >&2; exit 2; }
folder=$1 text=$2 model=$3 chunks=${4:-12}
here=$(cd "$(dirname "$0")" && pwd)
bin=${FEWBIT:-$here/../../target/release}
source=$folder/$model-F16.gguf stats=$folder/$model-stats.gguf

[ -e "$stats" ] || "$bin/fewbit" calibrate -m "$source" -f "$text" --chunks 60 -o "$stats" --moments --width 0 --sensitivity
convert() { # FILE OPTIONS…
    local file=$folder/$1.gguf
    shift
    [ -e "$file" ] || "$bin/fewbit-convert" "$source" "$file" --imatrix "$stats" "$@"
    files+=("$file")
}
files=()
for type in Q3_K_M Q3_K_L IQ4_XS Q4_K_S Q4_K_M Q5_K_M; do convert "$model-$type" --type $type; done
for type in IQ4_XS Q4_K_M Q5_K_M; do convert "$model-$type-gptq" --type $type --round gptq; done
for bits in 4.0 4.5 5.0; do convert "$model-fit-$bits-gptq" --bpw $bits --round gptq; done
"$bin/fewbit" ladder -f "$here/../fixtures/text/en.txt" --chunks "$chunks" --base "$source" \
    --out "$here/$model.md" --out "$here/$model.svg" "${files[@]}"
