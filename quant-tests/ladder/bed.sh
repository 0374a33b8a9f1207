#!/usr/bin/env bash
# The ladder of a model of the test bed: stock files and better bits side by side, as dense.md and dense.svg (moe.…) here.
#
#   quant-tests/ladder/bed.sh FOLDER dense|moe
#
# FOLDER holds dense-F16.gguf and moe-F16.gguf (quant-tests/upcycle.py, with --dense and without, then fewbit-convert
# --type F16); texts (texts.sh), statistics and files are made in it, and stay. FEWBIT names the folder of the binaries (target/release).
# Scored with f32 activations, so that only the files are compared. Two kinds of ours: types chosen for
# the size of a stock file (as-TYPE), and for bits a weight (bpw-BITS).
set -euo pipefail
[ $# -ge 2 ] || { sed -n '2,9s/^# \{0,1\}//p' "$0" >&2; exit 2; }
folder=$1 model=$2
# Chunks that are scored, that statistics are made from, and that each group's sensitivity is measured on.
case $model in
    dense) chunks=8 calibration=120 sensitivity=8 ;;
    moe) chunks=4 calibration=80 sensitivity=4 ;;
    *) echo "bed.sh: $model is neither dense nor moe" >&2 && exit 2 ;;
esac
here=$(cd "$(dirname "$0")" && pwd)
bin=$(cd "${FEWBIT:-$here/../../target/release}" && pwd)

[ -e "$folder/texts/calibration.txt" ] || "$here/texts.sh" "$folder/texts"
cp "$here/../fixtures/text/en.txt" "$folder/texts/"
cd "$folder" # names without folders in the report
source=$model-F16.gguf stats=$model-stats.gguf
[ -e "$stats" ] || "$bin/fewbit" calibrate -m "$source" -f texts/calibration.txt --chunks "$calibration" \
    -o "$stats" --moments --width 0 --sensitivity --sensitivity-chunks "$sensitivity"
convert() { # NAME OPTIONS…
    local file=$model-$1.gguf
    shift
    [ -e "$file" ] || "$bin/fewbit-convert" "$source" "$file" --imatrix "$stats" "$@"
    files+=("$file")
}
files=()
for type in Q3_K_M Q3_K_L IQ4_XS Q4_K_S Q4_K_M Q4_1 Q5_K_S Q5_K_M; do convert $type --type $type; done
for type in IQ4_XS Q4_K_S Q4_K_M Q5_K_M; do
    convert as-$type --fit "$(stat -c %s "$model-$type.gguf")" --round gptq
done
for bits in 4.0 4.5 5.0; do convert bpw-$bits --bpw $bits --round gptq; done
"$bin/fewbit" ladder -f texts/en.txt --chunks "$chunks" --activations f32 --base "$source" \
    --out "$here/$model.md" --out "$here/$model.svg" "${files[@]}"
