#!/usr/bin/env bash
# Measures everything that docs/benchmarks.md shows, on one GPU: benchmarks/release.sh [OPTION...] [FOLDER]
#
#   --dry-run       print the steps, and run nothing
#   --quick         tiny settings; without a GPU the steps that need one are named and left out
#   --only A,B      these steps alone
#   --minutes N     begin and end within N minutes (default 15)
#   --prefix NAME   of the files (default: the date and the device, as 2026-11-26-h100)
#
# The first step compiles what those after it launch, in as many processes as there are CPUs: nothing else runs beside it.
# A step's result is FOLDER/PREFIX-STEP.json (default folder: benchmarks/results), and a step whose result is there is
# not run again: the same command goes on where an earlier one ended. Each step has a limit of its own. FOLDER/PREFIX.tar.gz
# has all results and logs; FOLDER/PREFIX-summary.txt says what ran, on what, and how long it took. Exit status 1 where a
# step failed or the time was over. PYTHON names the interpreter.
set -uo pipefail
cd "$(dirname "$0")/.."

die() {
    echo "benchmarks/release.sh: error: $*" >&2
    exit 2
}

dry=0 quick=0 only="" minutes=15 prefix="" folder=""
while (($#)); do
    case "$1" in
    --dry-run) dry=1 ;;
    --quick) quick=1 ;;
    --only | --minutes | --prefix)
        (($# > 1)) || die "$1 needs a value"
        declare "${1#--}=$2"
        shift
        ;;
    --help | -h)
        sed -n '2,/^set/{/^set/d;s/^# \{0,1\}//;p;}' "$0"
        exit 0
        ;;
    -*) die "$1 is not known; --help lists the options" ;;
    *)
        [[ -z $folder ]] || die "one folder at most, got $folder and $1"
        folder=$1
        ;;
    esac
    shift
done
[[ $minutes =~ ^[0-9]+$ && $minutes -gt 0 ]] || die "--minutes is '$minutes', expected a number above 0"
folder=${folder:-benchmarks/results}
export PYTHON=${PYTHON:-$(command -v python || command -v python3)} PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1

# Device and number of GPUs, by torch: "h100 1", or "cpu 0".
probe='
import re, torch
count = torch.cuda.device_count() if torch.cuda.is_available() else 0
name = torch.cuda.get_device_name().lower() if count else "cpu"
found = re.search(r"\b(?:gh|gb|rtx|[abhlvt])[ -]?\d+\w*", name)
print((found[0] if found else name.split()[-1]).replace(" ", ""), count)'
device=DEVICE gpus=1
if ((!dry)); then
    read -r device gpus < <("$PYTHON" -c "$probe") || die "$PYTHON cannot import torch"
    ((gpus || quick)) || die "it needs a CUDA device, and torch sees none; --dry-run and --quick go without"
fi
prefix=${prefix:-$(date +%F)-$device}
began=$SECONDS deadline=$((SECONDS + minutes * 60)) status=0 steps=() report=()
# While this is 1 a step only says what it would compile.
listing=0

# step NAME LIMIT GPUS COMMAND...: RESULT in the command stands for the file that it writes.
step() {
    local name=$1 limit=$2 needs=$3
    shift 3
    ((listing)) || steps+=("$name")
    [[ -z $only || ,$only, == *,$name,* ]] || return 0
    local result=$folder/$prefix-$name.json partial=$folder/$prefix-$name.partial.json log=$folder/$prefix-$name.log
    if ((dry)); then
        printf '%-18s %4d s  %s\n' "$name" "$limit" "${*//RESULT/$result}"
        return 0
    fi
    if ((listing)); then
        [[ -s $result || " $* " != *" -m moe_ops bench "* ]] || echo "${@@Q}"
        return 0
    fi
    if [[ -s $result ]]; then
        note "$name" "done before"
        return 0
    fi
    if ((gpus < needs)); then
        note "$name" "left out: it needs $needs GPU(s), and torch sees $gpus"
        return 0
    fi
    local left=$((deadline - SECONDS)) start=$SECONDS code=0
    if ((left < 10)); then
        note "$name" "NOT RUN: the $minutes minutes are over; run the same command again"
        status=1
        return 0
    fi
    ((limit <= left)) || limit=$left
    echo "--- $name: ${*//RESULT/$result}"
    timeout --kill-after=15 "$limit" "${@//RESULT/$partial}" </dev/null >"$log" 2>&1 || code=$?
    tail -n 3 "$log"
    if ((code == 0)) && [[ -s $partial ]]; then
        mv "$partial" "$result"
        note "$name" "$((SECONDS - start)) s"
    else
        ((code != 124 && code != 137)) || code="its limit of $limit s"
        note "$name" "FAILED after $((SECONDS - start)) s ($code): see $log"
        status=1
    fi
}

note() {
    report+=("$(printf '%-18s %s' "$1" "$2")")
    echo "    $1: $2"
}

((dry)) || mkdir -p "$folder" || die "$folder is no folder and cannot be made"
bench=("$PYTHON" -m moe_ops bench --json RESULT --rounds 7)
few=(--shape mixtral-8x7b --shape gpt-oss-20b --tokens 1,4,16,64,256,1024,2048,16384)
rounds=(--rounds 7) host=() model=() ranks=() skew=(--tokens "256,4096") topk=() proof=(--seconds 150)
demo=(examples/generate.py --seconds 20) tiles=(--common --variant heuristic --variant tuned)
peers=benchmarks/results/2026-11-22-h200-peers
if ((quick)); then
    tiny=(--shape 8,2,256,128 --tokens "1,64")
    bench=("$PYTHON" -m moe_ops bench --json RESULT --rounds 2 "${tiny[@]}")
    few=() skew=() tiles=(--variant heuristic --variant tuned) demo=(examples/generate.py)
    rounds=(--rounds 2 --tokens 64) host=(--rounds 2 --repeats 20) topk=(--rounds 2 --tokens 1 64)
    proof=(--device cpu --seconds 60) model=(--small --run as-is --batch 1 --rounds 2)
    ranks=(--shapes tiny --tokens 4 --rounds 1)
    export MOE_OPS_EXAMPLE_QUICK=1
fi
((gpus == 0)) || host+=(--device cuda)

# What the docs lean on most comes first. Names of steps are those of results, and of markers in the docs.
all_steps() {
    step compile 150 1 "$PYTHON" benchmarks/ahead.py --json RESULT "$folder/$prefix-compile.txt"
    step whole-op-bf16 120 1 "${bench[@]}" --stages --variant tma --variant classic --variant grouped_mm
    step fp8-block 90 1 "${bench[@]}" --format fp8_block --variant tma --stages
    step fp8-channel 90 1 "${bench[@]}" --format fp8_channel --variant tma --stages
    step fp8-static 90 1 "${bench[@]}" --format fp8_tensor_static --variant tma --stages
    step skew-bf16 60 1 "${bench[@]}" --variant tma "${skew[@]}" --routing uniform --routing zipf --routing one --routing sparse
    step weights-bf16 60 1 "${bench[@]}" --variant tma "${few[@]}"
    step int8-weights 60 1 "${bench[@]}" --format int8_weights --variant tma "${few[@]}"
    step int4 60 1 "${bench[@]}" --format int4 --variant tma "${few[@]}"
    step mxfp4 60 1 "${bench[@]}" --format mxfp4 --variant tma "${few[@]}"
    step int8-channel 60 1 "${bench[@]}" --format int8_channel --variant tma "${few[@]}"
    step eager-bf16 45 1 "${bench[@]}" --eager --tokens 1
    step host-cost 30 0 "$PYTHON" benchmarks/host_cost.py --json RESULT "${host[@]}"
    step topk-route 45 1 "$PYTHON" benchmarks/topk_route.py --json RESULT "${topk[@]}"
    step tiles-bf16 100 1 "${bench[@]}" "${tiles[@]}" --recorded "$peers-bf16.json"
    step tiles-fp8-block 75 1 "${bench[@]}" --format fp8_block "${tiles[@]}" --recorded "$peers-fp8-block.json"
    step tiles-fp8-channel 75 1 "${bench[@]}" --format fp8_channel "${tiles[@]}" --recorded "$peers-fp8.json"
    step in-step 60 1 "$PYTHON" benchmarks/in_step.py --json RESULT "${rounds[@]}"
    step in-step-fp8 60 1 "$PYTHON" benchmarks/in_step.py --json RESULT --format fp8_block "${rounds[@]}"
    step end-to-end 220 $((1 - quick)) "$PYTHON" benchmarks/end_to_end.py --resume --json RESULT "${model[@]}"
    step expert-parallel 120 $((quick && !gpus ? 0 : 2)) "$PYTHON" benchmarks/expert_parallel.py --json RESULT "${ranks[@]}"
    step proof 190 0 "$PYTHON" benchmarks/proof.py --json RESULT "${proof[@]}"
    step demo 110 0 "$PYTHON" benchmarks/demo.py --json RESULT "${demo[@]}"
}

if ((!dry)); then
    listing=1
    all_steps >"$folder/$prefix-compile.txt"
    listing=0
fi
all_steps

for name in ${only//,/ }; do
    [[ " ${steps[*]} " == *" $name "* ]] || die "--only $name: there is no such step; there are ${steps[*]}"
done
((dry)) && exit 0
{
    "$PYTHON" -c 'import sys; sys.path.insert(0, "benchmarks"); from record import head; print(*head().values())'
    echo "commit $(git describe --always --dirty 2>/dev/null || echo unknown)"
    printf '%s\n' "${report[@]}"
    echo "all: $((SECONDS - began)) s"
} >"$folder/$prefix-summary.txt"
cat "$folder/$prefix-summary.txt"
(cd "$folder" && tar -czf "$prefix.tar.gz" "$prefix"-*)
echo "$folder/$prefix.tar.gz"
exit $status
