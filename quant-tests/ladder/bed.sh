#!/usr/bin/env bash
# The ladder of a model of the test bed: stock files and better bits side by side, as dense.md and dense.svg (moe.…) here.
#
#   quant-tests/ladder/bed.sh FOLDER dense|moe [CHUNKS [CALIBRATION_CHUNKS]]
#
# FOLDER holds dense-F16.gguf and moe-F16.gguf (quant-tests/upcycle.py, with --dense and without, then fewbit-convert
# --type F16); texts (texts.sh), statistics and files are made in it, and stay. FEWBIT names the folder of the binaries (target/release).
set -euo pipefail
[ $# -ge 2 ] || { sed -n '2,7s/^# \{0,1\}//p' "$0" >&2; exit 2; }
folder=$1 model=$2 chunks=${3:-12} calibration=${4:-60}
here=$(cd "$(dirname "$0")" && pwd)
bin=${FEWBIT:-$here/../../target/release}
source=$folder/$model-F16.gguf stats=$folder/$model-stats.gguf

[ -e "$folder/texts/calibration.txt" ] || "$here/texts.sh" "$folder/texts"
[ -e "$stats" ] || "$bin/fewbit" calibrate -m "$source" -f "$folder/texts/calibration.txt" --chunks "$calibration" \
    -o "$stats" --moments --width 0 --sensitivity
convert() { # FILE OPTIONS…
    local file=$folder/$1.gguf
    shift
    [ -e "$file" ] || "$bin/fewbit-convert" "$source" "$file" --imatrix "$stats" "$@"
    files+=("$file")
}
files=()
for type in Q3_K_M Q3_K_L IQ4_XS Q4_K_S Q4_K_M Q5_K_S Q5_K_M; do convert "$model-$type" --type $type; done
for type in IQ4_XS Q4_K_S Q4_K_M Q5_K_M; do convert "$model-$type-gptq" --type $type --round gptq; done
for bits in 4.0 4.5 5.0; do convert "$model-fit-$bits-gptq" --bpw $bits --round gptq; done
"$bin/fewbit" ladder -f "$here/../fixtures/text/en.txt" --chunks "$chunks" --base "$source" \
    --out "$here/$model.md" --out "$here/$model.svg" "${files[@]}"
