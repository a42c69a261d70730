#!/usr/bin/env bash
# bash benchmarks/gpu_suite.sh OUT [--first] [--cpu]
# Checks every kernel and times one size of everything (--first: no more, within 120 s); then parity tests, all times,
# other tests, compute-sanitizer, for SECONDS_LEFT seconds (560). Called again it goes on: what ended on this card at
# this commit is not repeated. OUT/gpu_CARD.csv has a row of each result as soon as it is known, OUT/log.txt the output.
# Needs torch and triton; nvcc for the CUDA kernels, pytest for the tests; installs nothing. PYTHON is the interpreter,
# COMMIT names the commit where git cannot. --cpu tries the script without a GPU. Exit code: 1 after a fault (a wrong
# result, a crash, a finding), 2 if it cannot begin. A target that is missed is a row that says so.
set -u
out="${1:?bash benchmarks/gpu_suite.sh OUT [--first] [--cpu]}" options=" ${*:2} "
mkdir -p "$out/small" && out="$(cd "$out" && pwd)" && cd "$(dirname "$0")/.." || exit 2
python="${PYTHON:-python3}" failed=0 deadline="${SECONDS_LEFT:-560}" backends=() building="" workers=()
PATH="$PATH:/usr/local/cuda/bin" COMMIT="${COMMIT:-$(git describe --always --dirty 2> /dev/null)}"
export COMMIT PYTHONPATH="$PWD/python" PYTHONUNBUFFERED=1 PYTHONFAULTHANDLER=1
unset DBMTL_BACKEND DBMTL_TRITON_LAUNCHES TRITON_INTERPRET
[[ $options == *" --first "* ]] && ((deadline > 115)) && deadline=115
[[ $options == *" --cpu "* ]] && export TRITON_INTERPRET=1
[[ $options == *" --cpu "* ]] || "$python" -c "import torch; torch.zeros(1, device='cuda')" || exit 2

rows() { "$python" benchmarks/gpu_rows.py "$1" "$out" "${@:2}"; }
has() { "$python" -c "import $2" 2> /dev/null || { rows note "$1" "skipped: no $2" && false; }; } # STAGE MODULE

stage() { # NAME SECONDS COMMAND...: its output into the log, a row of how it ended; its exit code, 0 where no fault
    local limit="$2" began=$SECONDS late="" verdict=done code
    if [[ $'\n'$ended == *$'\n'"$1="* ]]; then
        code="${ended##*"$1="}" && ((${code%%$'\n'*} == 0)) || failed=1
        return "${code%%$'\n'*}"
    fi
    [[ $1 == tests* ]] && late="done in part: $limit s are over"
    ((limit <= deadline - SECONDS)) || limit=$((deadline - SECONDS)) late="cut off: $deadline s are over"
    ((limit > 0)) || { rows note "$1" "$late" && return; }
    timeout --signal=ABRT --kill-after=5 "$limit" "${@:3}" 2>&1 | tee -a "$out/log.txt"
    code=${PIPESTATUS[0]}
    ((code == 0)) || verdict="FAULT: exit code $code"
    ((code == 9)) && verdict+=", compute-sanitizer found something"
    ((code == 124 || code == 137)) && verdict="${late:-$verdict, killed, or ran past $limit s}"
    [[ $verdict == FAULT* ]] && failed=1 || code=0
    [[ $1 == tests* ]] && rows note "$1, last line" "$(grep -E '%\]|[0-9] (passed|failed|skipped)' "$out/log.txt" | tail -n 1)"
    rows note "$1" "$verdict" $((SECONDS - began))
    return "$code"
}

section() { # NAME SECONDS BACKEND...: in turn; each alone, if that hangs or loses the device
    stage "$1 ${*:3}${DBMTL_TRITON_LAUNCHES:+, two launches}" "$2" "$python" benchmarks/gpu.py "$out" "$1" "${@:3}"
    local code=$? backend
    ((code > 1 && $# > 3)) && for backend in "${@:3}"; do section "$1" "$2" "$backend"; done
    return "$code"
}

parity() { section parity 60 "$1"; code=$?; ((code <= 1)) && backends+=("$1"); } # not what hangs or loses the device
tests() { has "$1" pytest && stage "$1" "$2" "$python" -m pytest -m gpu -q --maxfail 20 "${@:3}"; }

ended="$(rows ended)" || exit 2 # "STAGE=EXIT CODE" lines; or rows of another schema
rows note start "${COMMIT:-commit unknown, a second call repeats everything: COMMIT=... names it}"
if [[ $options != *" --cpu "* ]] && has build setuptools; then
    command -v nvcc > /dev/null && export DBMTL_CUDA=1
    [[ $options != *" --first "* || -e python/dbmtl_kernels/lib/libdbmtl_cpu.so ]] || export DBMTL_BUILD_NATIVE=0
    stage build 90 "$python" setup.py build_ext --inplace & building=$!
fi
parity triton
((code == 124 || code == 137)) && export DBMTL_TRITON_LAUNCHES=2 && parity triton # a barrier that hangs
[[ -z $building ]] || wait "$building" || failed=1
parity cuda
section first 120 "${backends[@]}"
[[ $options == *" --first "* ]] && exit "$failed"

"$python" -c "import xdist" 2> /dev/null && workers=(-n 6)
tests "tests of parity" 200 tests/gpu/test_gpu.py -k "not 31_elements" "${workers[@]}"
for name in dense step ops; do section "$name" 300 "${backends[@]}"; done
tests "tests of CUDA" 200 tests/gpu/test_cuda_only.py
for tool in memcheck racecheck synccheck initcheck; do
    check=(timeout 60 compute-sanitizer --tool "$tool" --error-exitcode 9 --report-api-errors no)
    # Races of others' kernels are not ours to judge; the other tools must see every kernel's writes.
    names=(balance_ accumulate_ rows_kernel combine_out gramian)
    [[ $tool == racecheck ]] && for name in "${names[@]}"; do check+=(--kernel-name "kns=$name"); done
    "${check[@]}" "$python" -c "import torch; torch.cuda.is_available() and torch.zeros(1).cuda()" &>> "$out/log.txt" ||
        { rows note "$tool" "skipped: compute-sanitizer is not here, or does not take this machine" && continue; }
    # Without torch's cache every tensor is an allocation of its own: what lies beyond its end is seen.
    check=(env PYTORCH_NO_CUDA_MEMORY_CACHING=1 "${check[@]:2}" "$python")
    stage "$tool" 200 "${check[@]}" benchmarks/gpu.py "$out/small" parity "${backends[@]}"
done
tests "tests of 2^31" 200 tests/gpu/test_gpu.py -k 31_elements
exit "$failed"
