#!/usr/bin/env bash
# Everything that only a GPU can show, part by part; a part that fails or runs out of time does not stop the next.
#
#   bash scripts/gpu_checks.sh                                  all parts in this order, with their limits
#   bash scripts/gpu_checks.sh contracts+tests:130 linear:90    the first two at once, for at most 130 seconds, then linear:
#                                                               what to run where four minutes are all there is
#
#   contracts   each kernel against its reference on this device      tests       every test marked gpu
#   linear      qtrain bench linear
#   warm        compiles for the benchmarks below, in many processes at once; times nothing
#   train       qtrain bench train, GPT-2 124M                        kernels     qtrain bench kernels, all ops
#   train_1b    like train, 16 layers of a 1B Llama
#
# What decides comes first: a machine may be taken away at any time, and each part leaves its files when it ends. On an H200
# with 16 cores contracts+tests took 112 seconds (14 workers each) and linear with 7 arms 60, compilation included.
# Without warm the benchmarks take longer and say the same. Output of a part: FOLDER/PART.txt and, of the benchmarks,
# PART.json and kernels.png. The environment may set
#   OUT            FOLDER (default: outputs/gpu_checks)
#   QTRAIN_PYTHON  the interpreter (default: python3)
#   ARGS_kernels, ARGS_linear, ...  more arguments of a part, as in ARGS_linear='arms=[bf16,native_int8]'; of warm: which
#                  benchmarks it compiles for (default: 'train kernels'; also linear, train_1b)
#   QTRAIN_TUNE_GEMMS=1  the benchmarks measure which GEMM is fastest for a shape, and keep it (kernels/README.md)
#   SHOW           lines of each part that are shown here (default: 15)
# Exits with 1 if a part failed.
set -uo pipefail

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
cd "$root" || exit 2
out="${OUT:-outputs/gpu_checks}"
python="${QTRAIN_PYTHON:-python3}"
export PYTHONPATH="$root:$root/kernels:$root/scripts${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
mkdir -p "$out"

declare -A limits=([contracts]=120 [tests]=180 [warm]=150 [kernels]=170 [linear]=240 [train]=200 [train_1b]=240)
steps=("$@")
[ ${#steps[@]} -gt 0 ] || steps=(contracts+tests linear warm train kernels train_1b)
for step in "${steps[@]}"; do
    for name in $(tr '+' ' ' <<<"${step%%:*}"); do
        if [ -z "${limits[$name]:-}" ]; then
            echo "unknown part $name; the parts are ${!limits[*]}" >&2
            exit 2
        fi
    done
done

command_of() { # the command of part $1, in the array `run`
    local workers=()
    "$python" -c 'import xdist' 2>/dev/null && workers=(-n "${QTRAIN_TEST_WORKERS:-14}")
    local pytest=("$python" -m pytest -q --tb=short -m gpu --no-header "${workers[@]}")
    local bench=("$python" -m qtrain.cli bench)
    local train=("${bench[@]}" train device=cuda rounds=8 output="$out/$1.json")
    case "$1" in
        contracts) run=("${pytest[@]}" tests/kernels -k contract) ;;
        tests) mapfile -t files < <(grep -rlE --include='test_*.py' 'mark\.gpu' tests) && run=("${pytest[@]}" "${files[@]}" -k 'not test_contract_on_cuda') ;;
        kernels) run=("$python" -m qtrain_kernels.bench --json "$out/kernels.json" --png "$out/kernels.png") ;;
        linear) run=("${bench[@]}" linear device=cuda output="$out/linear.json") ;;
        train) run=("${train[@]}" model=gpt_124m model.dropout=0 batch_sequences=16) ;;
        train_1b) run=("${train[@]}" model=llama_1b model.layers=16 batch_sequences=4) ;;
    esac
    local more="ARGS_$1" arguments
    read -r -a arguments <<<"${!more:-}"
    run+=("${arguments[@]}")
}

quietly() { # $1 seconds, then a command: its output is thrown away, its exit code printed
    local limit="$1" code
    shift
    timeout --kill-after=10 "$limit" "$@" >/dev/null 2>&1
    code=$?
    echo "exit $code: ${*:3}"
}

warm_up() { # $1 seconds. A process a contender: what is compiled stays in the caches of Inductor and Triton, on disk
    local scratch arm what
    scratch="$(mktemp -d)"
    for what in ${ARGS_warm:-train kernels}; do
        command_of "$what"
        case "$what" in
            linear)
                for arm in bf16_compiled native_int8,native_int8_requantized,native_fp8,native_fp8_tensorwise simulated torchao_int8 \
                    torchao_fp8_rowwise torchao_fp8_tensorwise; do
                    quietly "$1" "${run[@]}" "arms=[$arm]" rounds=5 output="$scratch/linear_$arm.json" &
                done
                ;;
            train | train_1b)
                for arm in bf16_compiled native_int8 native_fp8 simulated; do
                    quietly "$1" "${run[@]}" "arms=[$arm]" optimizers='[torch_fused]' rounds=5 \
                        output="$scratch/${what}_$arm.json" &
                done
                [ "$what" = train ] || wait # four of them fill a GPU
                ;;
            *) quietly "$1" "${run[@]}" --rounds 1 --json "$scratch/kernels.json" --png "$scratch/kernels.png" & ;;
        esac
    done
    wait
    rm -rf "$scratch"
}

run_part() { # $1 name, $2 seconds: its output to FOLDER/NAME.txt, its verdict to FOLDER/.NAME.verdict
    local start=$SECONDS code verdict
    # beside other processes a measured choice of GEMMs would be noise, and kept
    case "$1" in contracts | tests | warm) unset QTRAIN_TUNE_GEMMS ;; esac
    if [ "$1" = warm ]; then
        warm_up "$2" >"$out/$1.txt" 2>&1
    else
        command_of "$1"
        # pytest shows on SIGINT what has failed so far
        timeout --signal=INT --kill-after=10 "$2" "${run[@]}" >"$out/$1.txt" 2>&1
    fi
    code=$?
    case $code in
        0) verdict=ok ;;
        124 | 130 | 137) verdict="stopped at its limit of $2 s" ;;
        *) verdict="failed ($code)" ;;
    esac
    echo "$code $verdict, $((SECONDS - start)) s" >"$out/.$1.verdict"
}

failed=0
summary=""
for step in "${steps[@]}"; do
    read -r -a names <<<"$(tr '+' ' ' <<<"${step%%:*}")"
    for name in "${names[@]}"; do
        limit="${limits[$name]}"
        [ "$step" = "${step%%:*}" ] || limit="${step#*:}"
        run_part "$name" "$limit" &
    done
    wait
    for name in "${names[@]}"; do
        read -r code verdict <"$out/.$name.verdict"
        rm -f "$out/.$name.verdict"
        [ "$code" -eq 0 ] || failed=1
        echo "== $name: $verdict"
        tail -n "${SHOW:-15}" "$out/$name.txt" | cut -c1-300
        summary+="$(printf '%-10s %s' "$name" "$verdict")"$'\n'
    done
done
printf '\n%s' "$summary"
exit $failed
