#!/usr/bin/env bash
# Everything that only a GPU can show, part by part; a part that fails or runs out of time does not stop the next.
#
#   bash scripts/gpu_checks.sh                          all parts, with their limits
#   bash scripts/gpu_checks.sh contracts linear:120     these parts, the second for at most 120 seconds
#
#   contracts   each kernel against its reference on this device      tests       every test marked gpu
#   kernels     qtrain bench kernels, all ops                         linear      qtrain bench linear
#   train       qtrain bench train, GPT-2 124M                        train_1b    the same, 16 layers of a 1B Llama
#
# Output of a part: FOLDER/PART.txt and, of the benchmarks, PART.json and kernels.png. The environment may set
#   OUT            FOLDER (default: outputs/gpu_checks)
#   QTRAIN_PYTHON  the interpreter (default: python3)
#   ARGS_kernels, ARGS_linear, ...  more arguments of a part, as in ARGS_linear='arms=[bf16,native_int8]'
#   SHOW           lines of each part that are shown here (default: 15)
# Exits with 1 if a part failed.
set -uo pipefail

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
cd "$root" || exit 2
out="${OUT:-outputs/gpu_checks}"
python="${QTRAIN_PYTHON:-python3}"
export PYTHONPATH="$root:$root/kernels:$root/scripts${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
mkdir -p "$out"

declare -A limits=([contracts]=120 [tests]=180 [kernels]=170 [linear]=240 [train]=200 [train_1b]=240)
parts=("$@")
[ ${#parts[@]} -gt 0 ] || parts=(contracts tests kernels linear train train_1b)
for part in "${parts[@]}"; do
    if [ -z "${limits[${part%%:*}]:-}" ]; then
        echo "unknown part ${part%%:*}; the parts are ${!limits[*]}" >&2
        exit 2
    fi
done

command_of() { # the command of part $1, in the array `run`
    local workers=()
    "$python" -c 'import xdist' 2>/dev/null && workers=(-n 6)
    local pytest=("$python" -m pytest -q -m gpu --no-header "${workers[@]}")
    local bench=("$python" -m qtrain.cli bench)
    local train=("${bench[@]}" train device=cuda output="$out/$1.json")
    case "$1" in
        contracts) run=("${pytest[@]}" tests/kernels) ;;
        tests) mapfile -t files < <(grep -rl --include='test_*.py' 'mark\.gpu' tests) && run=("${pytest[@]}" "${files[@]}") ;;
        kernels) run=("$python" -m qtrain_kernels.bench --json "$out/kernels.json" --png "$out/kernels.png") ;;
        linear) run=("${bench[@]}" linear device=cuda output="$out/linear.json") ;;
        train) run=("${train[@]}" model=gpt_124m model.dropout=0 batch_sequences=32) ;;
        train_1b) run=("${train[@]}" model=llama_1b model.layers=16 batch_sequences=4) ;;
    esac
}

failed=0
summary=""
for part in "${parts[@]}"; do
    name="${part%%:*}"
    limit="${limits[$name]}"
    [ "$part" = "$name" ] || limit="${part#*:}"
    command_of "$name"
    more="ARGS_$name"
    read -r -a arguments <<<"${!more:-}"
    start=$SECONDS
    timeout --kill-after=10 "$limit" "${run[@]}" "${arguments[@]}" >"$out/$name.txt" 2>&1
    code=$?
    case $code in
        0) verdict=ok ;;
        124 | 137) verdict="stopped at its limit of $limit s" ;;
        *) verdict="failed ($code)" ;;
    esac
    [ $code -eq 0 ] || failed=1
    echo "== $name: $verdict, $((SECONDS - start)) s"
    tail -n "${SHOW:-15}" "$out/$name.txt" | cut -c1-300
    summary+="$(printf '%-10s %s, %s s' "$name" "$verdict" "$((SECONDS - start))")"$'\n'
done
printf '\n%s' "$summary"
exit $failed
