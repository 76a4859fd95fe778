#!/usr/bin/env bash
# Check, then measure: one call on a machine with a GPU. Installs nothing; whatever ends early leaves what it had.
#
#   bash tests/bench/gpu.sh OUT           OUT gets log.txt, kernels.csv, train_gpu.csv, tuning.json, plots.tar
#
# PYTHON names the interpreter, BUDGET_S the seconds for all parts (570), PARTS those to run, BENCH_COMMIT the commit
# where the checkout came without its history. Exit status: 1 if a part failed or was cut short.
#
#   check   tests/gpu and tests/kernels on the GPU itself
#   first   the shapes that a goal names, with the settings that are built in: figures even if tuning takes too long
#   goals   the same after measuring the settings, beside the packages that are installed
#   train   a whole training step (needs pydantic)
#   rest    every other shape and provider, for as long as there is time
set -u
cd "$(dirname "$0")/../.."
out=${1:?usage: bash tests/bench/gpu.sh OUT}
mkdir -p "$out"
out=$(cd "$out" && pwd)
log=$out/log.txt
python=${PYTHON:-python3}
parts=${PARTS:-check first goals train rest}
end=$((SECONDS + ${BUDGET_S:-570}))
status=0
export PYTHONUNBUFFERED=1 TRITON_INTERPRET=0 MPLBACKEND=Agg DEEPSEEK_RAY_KERNEL_TUNING=$out/tuning.json
bench=("$python" -m tests.bench.bench_kernels --out "$out/kernels.csv")

part() { # name, most seconds, command: runs it if it was asked for, within its own limit and what is left of all
    local name=$1 limit=$2 start=$SECONDS left=$((end - SECONDS - 20)) code
    shift 2
    [[ " $parts " == *" $name "* ]] || return 0
    ((limit < left)) || limit=$left
    if ((limit < 5)); then
        echo "$name: no time left" | tee -a "$log"
        status=1
        return 0
    fi
    echo "== $name: $*" >>"$log"
    timeout --signal=INT --kill-after=10 "$limit" "$@" >>"$log" 2>&1
    code=$?
    ((code == 0)) || status=1
    echo "$name: exit $code after $((SECONDS - start)) of $limit s" | tee -a "$log"
}

together=()
"$python" -c 'import xdist' 2>/dev/null && together=(-n 8) # most of the time goes into compiling
# what compares with this project's own versions, or is about CPUs, says nothing here
part check 170 "$python" -m pytest -q -p no:cacheprovider -W default "${together[@]}" --continue-on-collection-errors \
    tests/gpu tests/kernels --ignore tests/kernels/test_aot.py --ignore tests/kernels/test_bench_kernels.py
part first 90 "${bench[@]}" --goals --repeats 10 --providers ours 'torch grouped_mm'
part goals 170 "${bench[@]}" --goals --tune --repeats 20 --providers ours 'torch grouped_mm' liger sonicmoe quack cut
part train 80 "$python" -m tests.bench.train_gpu --out "$out/train_gpu.csv"
part rest 570 "${bench[@]}" --repeats 10

if [[ -f $out/kernels.csv ]]; then
    "$python" -m tests.bench.bench_kernels --report "$out/kernels.csv" --plots "$out/plots" 2>&1 | tee -a "$log"
    tar -C "$out" -cf "$out/plots.tar" plots && rm -r "$out/plots"
fi
grep -E '^(FAILED|ERROR) |passed|failed' "$log" | cut -c1-200 | head -40
exit "$status"
