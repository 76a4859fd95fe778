#!/usr/bin/env bash
# Kernels under compute-sanitizer: accesses outside of buffers, then races in shared memory. Small shapes, one run each.
#
#   bash tests/gpu/sanitize.sh            needs a GPU and compute-sanitizer; says so where there is none
#
# PYTHON names the interpreter, LIMIT_S the seconds for each tool (1200).
set -u
cd "$(dirname "$0")/../.."
python=${PYTHON:-python3}

if ! command -v compute-sanitizer >/dev/null; then
    echo "nothing checked: compute-sanitizer is not installed (it is part of the CUDA toolkit)"
    exit 0
fi
if ! "$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
    echo "nothing checked: $python sees no GPU"
    exit 0
fi
export PYTORCH_NO_CUDA_MEMORY_CACHING=1 # one allocation a tensor, or a neighbour's memory hides what is outside
export DEEPSEEK_RAY_KERNEL_TUNING=off TRITON_INTERPRET=0
status=0
for tool in memcheck racecheck; do
    echo "== $tool"
    timeout --kill-after=10 "${LIMIT_S:-1200}" compute-sanitizer --tool "$tool" --error-exitcode 9 \
        "$python" -m pytest -q -p no:cacheprovider -W default --timeout 0 tests/gpu -k "error and small" || status=$?
done
exit "$status"
