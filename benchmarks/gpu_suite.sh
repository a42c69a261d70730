#!/usr/bin/env bash
# bash benchmarks/gpu_suite.sh OUT [--first] [--cpu]
# Checks every kernel and times one size of everything (--first: no more than that, within 120 s); then the tests that
# need a GPU, all times, compute-sanitizer. OUT/gpu_CARD.csv has a row of each result as soon as it is known, OUT/log.txt
# what was printed. Needs torch and triton; nvcc for the CUDA kernels, pytest for the tests; installs nothing. PYTHON is
# the interpreter, COMMIT names the commit where git cannot. --cpu tries the script without a GPU. Exit code: 1 after a
# fault (a wrong result, a crash, a finding). A target that is missed is a row that says so.
set -u
out="${1:?bash benchmarks/gpu_suite.sh OUT [--first] [--cpu]}" options=" ${*:2} "
mkdir -p "$out/small" && out="$(cd "$out" && pwd)" && cd "$(dirname "$0")/.." || exit 2
python="${PYTHON:-python3}" failed=0 deadline=86400 backends=()
PATH="$PATH:/usr/local/cuda/bin"
export PYTHONPATH="$PWD/python" PYTHONUNBUFFERED=1
unset DBMTL_BACKEND DBMTL_TRITON_LAUNCHES TRITON_INTERPRET
[[ $options == *" --first "* ]] && deadline=115
[[ $options == *" --cpu "* ]] && export TRITON_INTERPRET=1
[[ $options == *" --cpu "* ]] || "$python" -c "import torch; torch.zeros(1, device='cuda')" || exit 2

note() { "$python" benchmarks/gpu_rows.py note "$out" stage "$@"; }
has() { "$python" -c "import $2" 2> /dev/null || { note "$1" "skipped: no $2" && false; }; } # STAGE MODULE

stage() { # NAME SECONDS COMMAND...: its output into the log, a row of how it ended
    local limit="$2" began=$SECONDS late="" verdict=done code
    ((limit <= deadline - SECONDS)) || limit=$((deadline - SECONDS)) late="cut off: $deadline s are over"
    ((limit > 0)) || { note "$1" "$late" && return; }
    timeout --kill-after=5 "$limit" "${@:3}" 2>&1 | tee -a "$out/log.txt"
    code=${PIPESTATUS[0]}
    ((code == 0)) || verdict="FAULT: exit code $code"
    ((code == 9)) && verdict="FAULT: compute-sanitizer found something"
    ((code == 124 || code == 137)) && verdict="${late:-FAULT: killed, or ran past $limit s}"
    [[ $verdict == FAULT* ]] && failed=1
    note "$1" "$verdict" $((SECONDS - began))
    return "$code"
}

section() { stage "$1 ${*:3}" "$2" "$python" benchmarks/gpu.py "$out" "$1" "${@:3}"; } # NAME SECONDS BACKEND...

for backend in triton cuda; do
    if [[ $backend == cuda && $options != *" --cpu "* ]] && has build setuptools; then
        command -v nvcc > /dev/null && export DBMTL_CUDA=1
        stage build 90 "$python" setup.py build_ext --inplace
    fi
    section parity 60 "$backend"
    (($? <= 1)) && backends+=("$backend") # not what hangs or loses the device
done
section first 120 "${backends[@]}"
[[ $options == *" --first "* ]] && exit "$failed"

has tests pytest && { stage tests 900 "$python" -m pytest -m gpu tests/gpu -q --maxfail 20
    note "tests, last line" "$(tail -n 1 "$out/log.txt")"; }
for name in dense step ops; do
    section "$name" 300 "${backends[@]}"
done
# Without torch's cache every tensor is an allocation of its own: what lies beyond its end is seen.
export PYTORCH_NO_CUDA_MEMORY_CACHING=1
for tool in memcheck racecheck synccheck initcheck; do
    check=(compute-sanitizer --tool "$tool" --error-exitcode 9 --report-api-errors no "$python")
    if "${check[@]}" -c "import torch; torch.cuda.is_available() and torch.zeros(1).cuda()" >> "$out/log.txt" 2>&1; then
        stage "$tool" 200 "${check[@]}" benchmarks/gpu.py "$out/small" parity "${backends[@]}"
    else
        note "$tool" "skipped: compute-sanitizer is not here, or does not take this machine"
    fi
done
exit "$failed"
