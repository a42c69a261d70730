#!/usr/bin/env bash
# bash benchmarks/gpu_suite.sh OUT_DIR [--first] [--cpu]
# Builds, checks every kernel, measures; without --first, then the tests that need a GPU, all times, compute-sanitizer.
# --first takes two minutes. OUT_DIR/results.csv (see gpu.py) grows by a row as soon as one is known; each stage has its
# log there, and a line in stages.csv: name, exit code, seconds. Needs torch, triton, numpy, pytest; nvcc for the CUDA
# kernels; installs nothing. --cpu tries the script on a CPU. PYTHON is the interpreter.
# Exit code: 1 if a stage failed. A target that is missed is a row that says so, and no failure.
set -u
out="${1:?bash benchmarks/gpu_suite.sh OUT_DIR [--first] [--cpu]}"
options=" ${*:2} "
mkdir -p "$out" && out="$(cd "$out" && pwd)" && cd "$(dirname "$0")/.." || exit 2
python="${PYTHON:-python3}"
PATH="$PATH:/usr/local/cuda/bin"
export PYTHONPATH="$PWD/python:$PWD/tests/support:$PWD/tests" PYTHONUNBUFFERED=1
unset DBMTL_BACKEND DBMTL_TRITON_LAUNCHES TRITON_INTERPRET
gpu=1 failed=0

stage() { # NAME SECONDS COMMAND...
    local name="$1" limit="$2" began=$SECONDS code=0
    timeout --kill-after=10 "$limit" "${@:3}" > "$out/$name.log" 2>&1 || code=$? failed=1
    echo "$name,$code,$((SECONDS - began))" | tee -a "$out/stages.csv"
    ((code == 0)) || tail -n 5 "$out/$name.log"
}

if [[ $options == *" --cpu "* ]]; then
    export TRITON_INTERPRET=1
    gpu=0
elif ! "$python" -c "import torch; exit(not torch.cuda.is_available())"; then
    echo "torch finds no GPU here; --cpu tries the script on a CPU" >&2
    exit 2
else
    command -v nvcc > /dev/null && export DBMTL_CUDA=1
    stage build 120 "$python" setup.py build_ext --inplace
fi
stage first 120 "$python" benchmarks/gpu.py "$out" first
if [[ $options != *" --first "* ]]; then
    ((gpu)) && stage tests 400 "$python" -m pytest -m gpu tests/gpu -q
    stage times 400 "$python" benchmarks/gpu.py "$out" times
    # Without torch's cache every tensor is an allocation of its own: what lies beyond its end is seen.
    export PYTORCH_NO_CUDA_MEMORY_CACHING=1
    for tool in $( ((gpu)) && command -v compute-sanitizer > /dev/null && echo memcheck racecheck synccheck initcheck); do
        stage "$tool" 200 compute-sanitizer --tool "$tool" --error-exitcode 1 --report-api-errors no \
            "$python" benchmarks/gpu.py "$out" parity
    done
fi
exit "$failed"
